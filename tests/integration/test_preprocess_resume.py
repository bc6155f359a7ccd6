"""Runs that are killed, whole process group at a time, and taken up again: the same bytes as the engine's builder."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from helpers.corpus import python_sources, write_jsonl
from helpers.events import HANG
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_mixtral.tokenizer import mixtral_tokenizer_path

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two plain files and a packed one, and the files that the engine's builder makes of sentencepiece's ids."""
    root = tmp_path_factory.mktemp("corpus")
    texts = python_sources(400, largest=8_000)
    for name, some in {"0.jsonl": texts[:150], "1.jsonl.gz": texts[150:200], "2.jsonl": texts[200:]}.items():
        write_jsonl(root / "in" / name, some)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(mixtral_tokenizer_path()))
    builder = IndexedDatasetBuilder(str(root / "engine.bin"), dtype=DType.optimal_dtype(32000))
    for text in texts:
        ids = [*reference.encode(text), 2]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(root / "engine.idx"))
    return root / "in", [(root / f"engine{end}").read_bytes() for end in (".bin", ".idx")]


def command(inputs, prefix, workers, *flags):
    return [
        sys.executable, "tools/preprocess_data.py", "--input", str(inputs), "--output-prefix", str(prefix),
        "--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", str(mixtral_tokenizer_path()), "--append-eod",
        "--tokenizer-engine", "sentencepiece", "--workers", str(workers), *flags,
    ]  # fmt: skip


def run(*args):
    return subprocess.run(command(*args), cwd=ROOT, capture_output=True, text=True, timeout=HANG)


def result(prefix):
    return [Path(f"{prefix}_text_document{end}").read_bytes() for end in (".bin", ".idx")]


def killed(counted, number, *args):
    """Start a run that is killed, parent and workers, before its change of the disk of this number; 0: it is not."""
    program = [sys.executable, "tests/helpers/killed.py", str(number), str(counted)]
    return subprocess.run([*program, *command(*args)[1:]], cwd=ROOT, capture_output=True, text=True, timeout=HANG,
                          start_new_session=True).returncode  # fmt: skip


def assert_whole_or_absent(prefix, expected):
    """Under a final name is nothing, or all of it; the report is the last."""
    for end, content in zip((".bin", ".idx"), expected, strict=True):
        path = Path(f"{prefix}_text_document{end}")
        if path.exists():
            assert path.read_bytes() == content
        else:
            assert not prefix.with_name("reports").joinpath("set.report.json").exists()


def kill_and_resume(corpus, tmp_path, kills, seed):
    inputs, expected = corpus
    draw, counted = random.Random(seed), tmp_path / "changes"
    assert killed(counted, 0, inputs, tmp_path / "whole" / "set", 2) == 0
    assert result(tmp_path / "whole" / "set") == expected
    changes, unfinished = int(counted.read_text()), 0
    assert changes > 30
    for number in range(kills):
        prefix = tmp_path / str(number) / "set"
        assert killed(counted, draw.randint(3, changes // 2), inputs, prefix, draw.choice((1, 2, 3))) == -9
        unfinished += not list(prefix.parent.glob("set*"))
        assert_whole_or_absent(prefix, expected)
        # The second run has less to do, and may be through before it makes so many changes.
        assert killed(counted, draw.randint(3, changes // 2), inputs, prefix, 2) in (-9, 0)
        assert_whole_or_absent(prefix, expected)
        done = run(inputs, prefix, draw.choice((1, 2, 3)))
        assert done.returncode == 0, done.stderr
        assert result(prefix) == expected
        assert [path.name for path in prefix.parent.iterdir() if path.name.startswith(".")] == []
    assert unfinished > 0


def test_killed_twice(corpus, tmp_path):
    kill_and_resume(corpus, tmp_path, 2, seed=0)


@pytest.mark.slow
def test_killed_at_ten_random_places(corpus, tmp_path):
    kill_and_resume(corpus, tmp_path, 10, seed=1)


def stop_in_the_middle(corpus, tmp_path):
    """A run that a bad line at the end of the corpus stopped; the input, which is mended now, and the prefix."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    for path in corpus[0].iterdir():
        (inputs / path.name).write_bytes(path.read_bytes())
        os.utime(inputs / path.name, ns=(1, 1))
    (inputs / "3.jsonl").write_text("{}\n")
    prefix = tmp_path / "out" / "set"
    done = run(inputs, prefix, 2)
    assert done.returncode == 1 and "3.jsonl:1: missing_key" in done.stderr and "goes on from there" in done.stderr
    (inputs / "3.jsonl").unlink()
    return inputs, prefix


def test_finished_pieces_are_used_again(corpus, tmp_path):
    inputs, prefix = stop_in_the_middle(corpus, tmp_path)
    done = run(inputs, prefix, 1)
    assert done.returncode == 0 and "going on with an unfinished run" in done.stderr
    report = json.loads(prefix.with_name("reports").joinpath("set.report.json").read_text())
    assert report["pieces"]["from_an_earlier_run"] == report["pieces"]["all"] > 10
    assert result(prefix) == corpus[1]
    assert report["keys"]["text"]["documents"] == report["records"] == 400


def test_other_flags_begin_anew_and_changed_inputs_are_read_again(corpus, tmp_path):
    inputs, prefix = stop_in_the_middle(corpus, tmp_path)
    os.utime(inputs / "2.jsonl", ns=(2, 2))
    done = run(inputs, prefix, 2)
    assert "finished pieces belong to inputs that have changed" in done.stderr and result(prefix) == corpus[1]
    report = json.loads(prefix.with_name("reports").joinpath("set.report.json").read_text())
    assert 0 < report["pieces"]["from_an_earlier_run"] < report["pieces"]["all"]
    (inputs / "3.jsonl").write_text("{}\n")
    assert run(inputs, prefix, 2).returncode == 1
    (inputs / "3.jsonl").unlink()
    done = run(inputs, prefix, 2, "--prepend-bod")
    assert "with another --prepend-bod: they are cleared" in done.stderr and done.returncode == 0
    assert len(result(prefix)[0]) == len(corpus[1][0]) + 2 * 400


def test_damaged_pieces_are_made_again(corpus, tmp_path):
    inputs, prefix = stop_in_the_middle(corpus, tmp_path)
    scratch = prefix.parent / ".set.preprocess"
    with open(scratch / "set_text_document.bin.tmp", "r+b") as stream:  # as a disk that lost power may leave it
        size = stream.seek(0, os.SEEK_END)
        stream.seek(size // 2)
        stream.write(bytes(1000))
    with open(scratch / "finished.jsonl", "a") as stream:
        stream.write('{"chunk": "part-torn')
    assert run(inputs, prefix, 2).returncode == 0
    assert result(prefix) == corpus[1]


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_any_number_of_workers(corpus, tmp_path, workers):
    assert run(corpus[0], tmp_path / "set", workers).returncode == 0
    assert result(tmp_path / "set") == corpus[1]
