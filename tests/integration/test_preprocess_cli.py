"""`tools/preprocess_data.py` as users type it: from a clone, without installation, in processes of its own."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from helpers.corpus import python_sources, write_jsonl
from helpers.events import HANG, until

from examples.quickstart.hf_tokenizer import write_hf_tokenizer
from megatron_mixtral.tokenizer import mixtral_tokenizer_path

ROOT = Path(__file__).resolve().parents[2]


def environment(**variables):
    """Without PYTHONPATH, so that the tool has to find the library itself."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MIXTRAL_HUGGINGFACE_PATH")}
    return {**kept, **{key: str(value) for key, value in variables.items()}}


def bash(command, **variables):
    """Runs a command of the documentation as it is written, from the root of the clone."""
    python = str(Path(sys.executable).parent)
    variables = environment(**variables)
    variables["PATH"] = f"{python}:{variables['PATH']}"
    return subprocess.run(
        ["bash", "-euc", command], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=HANG
    )


def tool(*flags, **variables):
    command = [sys.executable, "tools/preprocess_data.py", *map(str, flags)]
    return subprocess.run(
        command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=HANG
    )


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".idx")}


def flat_ids(base):
    index = base.with_name(base.name + ".idx").read_bytes()
    lengths = np.frombuffer(index, dtype="<i4", count=int.from_bytes(index[18:26], "little"), offset=34)
    return np.fromfile(f"{base}.bin", dtype="<u2"), lengths


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """1,000 real documents in a folder of three files, and their ids by sentencepiece, each with EOS."""
    texts = python_sources(1000, largest=12_000)
    root = tmp_path_factory.mktemp("data")
    for number, (start, end) in enumerate([(0, 400), (400, 800), (800, 1000)]):
        write_jsonl(root / "common_crawl" / f"{(0, 2, 10)[number]}.jsonl", texts[start:end])
    reference = sentencepiece.SentencePieceProcessor(model_file=str(mixtral_tokenizer_path()))
    return root, [[*reference.encode(text), 2] for text in texts]


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "Mixtral-8x7B"
    write_hf_tokenizer(path)
    return path


FOLDER_COMMAND = r"""
python tools/preprocess_data.py \
       --input $DATA_ROOT_DIR/common_crawl \
       --output-prefix $ENCODED_DATA_ROOT_DIR/common_crawl \
       --json_keys text \
       --dataset-impl mmap \
       --tokenizer-type PretrainedTokenizerFromHF \
       --tokenizer-model  \
       --append-eod \
       --workers 8
"""

FILE_COMMAND = r"""
python ./tools/preprocess_data.py \
    --input $DATASET/2.jsonl \
    --output-prefix $OUT/alpaca \
    --tokenizer-type PretrainedFromHF \
    --tokenizer-name-or-path $MODEL/ \
    --append-eod \
    --tokenizer-not-use-fast \
    --workers 4
"""


def test_folder_command(corpus, tmp_path):
    root, expected = corpus
    done = bash(FOLDER_COMMAND, DATA_ROOT_DIR=root, ENCODED_DATA_ROOT_DIR=tmp_path / "encoded")
    assert done.returncode == 0, done.stderr
    assert "using the Mixtral-8x7B-v0.1 tokenizer of mistral-common" in done.stderr
    ids, lengths = flat_ids(tmp_path / "encoded" / "common_crawl_text_document")
    assert lengths.tolist() == [len(document) for document in expected]
    assert np.array_equal(ids, np.concatenate(expected))


def test_any_number_of_workers_gives_the_same_bytes(tmp_path):
    texts = python_sources(160, largest=12_000)
    for number in range(4):
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", texts[40 * number : 40 * number + 40])
    model = ["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", mixtral_tokenizer_path()]
    found = {}
    for workers in (1, 2, 3):
        output = tmp_path / str(workers)
        flags = ["--input", tmp_path / "in", "--output-prefix", output / "set", "--workers", workers]
        assert tool(*flags, *model, "--append-eod").returncode == 0
        found[workers] = files(output)
    assert len(found[1]) == 2 and found[1] == found[2] == found[3]


def test_file_command_with_a_hf_folder(corpus, hf_folder, tmp_path):
    root, expected = corpus
    done = bash(FILE_COMMAND, DATASET=root / "common_crawl", MODEL=hf_folder, OUT=tmp_path)
    assert done.returncode == 0, done.stderr
    ids, lengths = flat_ids(tmp_path / "alpaca_text_document")
    assert np.array_equal(ids, np.concatenate(expected[400:800])) and len(lengths) == 400
    report = json.loads((tmp_path / "reports" / "alpaca.report.json").read_text())
    assert report["tokenizer"]["name"] == "tokenizers:tokenizer.json"


def test_the_engine_reads_the_result(corpus, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    root, expected = corpus
    flags = ["--input", root / "common_crawl" / "10.jsonl", "--output-prefix", tmp_path / "set", "--workers", 2]
    assert tool(*flags, "--tokenizer-type", "PretrainedTokenizerFromHF", "--append-eod").returncode == 0
    dataset = IndexedDataset(str(tmp_path / "set_text_document"))
    assert len(dataset) == 200
    for index in (0, 57, 199):
        assert dataset[index].tolist() == expected[800 + index]


def test_the_folder_of_the_environment(corpus, hf_folder, tmp_path):
    root, _ = corpus
    flags = ["--input", root / "common_crawl" / "10.jsonl", "--output-prefix", tmp_path / "set", "--workers", 1]
    done = tool(*flags, "--tokenizer-type", "PretrainedFromHF", MIXTRAL_HUGGINGFACE_PATH=hf_folder)
    assert done.returncode == 0 and f"using MIXTRAL_HUGGINGFACE_PATH, {hf_folder}" in done.stderr


@pytest.mark.parametrize(
    ("workers", "line"),
    [(2, b'{"text": "cut'), (3, b'{"text": "\xff"}'), (1, b'{"content": "x"}'), (2, b"\xef\xbb\xbf{}")],
    ids=["bad_json", "bad_utf8", "missing_key", "bom"],
)
def test_a_bad_line_ends_the_run_with_its_place(tmp_path, workers, line):
    good = [b'{"text": "%s"}\n' % (b"word " * 400) for _ in range(300)]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"".join([*good[:211], line + b"\n", *good[211:]]))
    flags = ["--input", path, "--output-prefix", tmp_path / "out" / "set", "--workers", workers]
    done = tool(*flags, "--tokenizer-type", "PretrainedTokenizerFromHF", "--append-eod")
    assert done.returncode == 1 and f"error: {path}:212: " in done.stderr and "Traceback" not in done.stderr
    assert visible(tmp_path / "out") == []


def visible(folder):
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def start(tmp_path, workers=2):
    """A run that takes a while, and its process after the workers have begun to write."""
    path = write_jsonl(tmp_path / "x.jsonl", python_sources(600) * 3)
    command = [sys.executable, "tools/preprocess_data.py", "--input", path, "--output-prefix", tmp_path / "out" / "set",
               "--tokenizer-type", "PretrainedTokenizerFromHF", "--append-eod", "--workers", str(workers),
               "--tokenizer-engine", "sentencepiece"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    until(lambda: process.poll() is not None or list((tmp_path / "out").glob(".set.preprocess/part-*")))
    assert process.poll() is None, process.stderr.read()
    return process


def children(pid):
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        # With the start method spawn, the resource tracker of multiprocessing is a child too.
        if int(fields[1]) == pid and b"resource_tracker" not in (entry.parent / "cmdline").read_bytes():
            found.append(int(entry.parent.name))
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes by /proc")


@needs_proc
def test_a_worker_that_dies_is_an_error_at_once(tmp_path):
    process = start(tmp_path)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 1 and "A worker process died (signal 9 (SIGKILL))" in errors
    assert visible(tmp_path / "out") == []


# A program of a user's, which forgets that fresh workers import it: each of them would start workers of its own.
UNGUARDED = """
import sys, threading
from megatron_mixtral.data.text import TextOptions, preprocess_text
threading.Thread(target=threading.Event().wait, daemon=True).start()
source, prefix, model = sys.argv[1:]
preprocess_text(TextOptions((source,), prefix, model, tokenizer_type="Llama2Tokenizer", workers=2, chunk_bytes=1000))
"""


def test_a_fresh_worker_that_dies_at_once_is_an_error(tmp_path):
    """A process with threads starts workers afresh; it must not wait for those that end before they read their job."""
    write_jsonl(tmp_path / "in.jsonl", python_sources(20))
    (tmp_path / "program.py").write_text(UNGUARDED)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "in.jsonl"), str(tmp_path / "out" / "set"),
         str(mixtral_tokenizer_path())],
        env=environment(PYTHONPATH=ROOT), capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip
    assert done.returncode == 1 and "A worker process died (status 1) when it started" in done.stderr
    assert visible(tmp_path / "out") == []


def start_instruction(tmp_path):
    """The same of instruction data. It has begun when the log says so, which the workers have made happen."""
    path = tmp_path / "x.jsonl"
    path.write_text((json.dumps({"instruction": "Count.", "output": "1 2 3 " * 500}) + "\n") * 20_000)
    command = [sys.executable, "tools/preprocess_data.py", "--input", path, "--output-prefix", tmp_path / "out" / "set",
               "--tokenizer-type", "PretrainedTokenizerFromHF", "--handler-name", "alpaca", "--workers", "2",
               "--log-interval", "100"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    assert any(" records, " in line for line in process.stderr), "it ended before it began"
    return process


@needs_proc
@pytest.mark.parametrize("start", [start, start_instruction])
def test_no_worker_outlives_a_parent_that_was_killed(tmp_path, start):
    """Not even in the middle of a piece."""
    process = start(tmp_path)
    workers = children(process.pid)
    assert len(workers) == 2
    handles = [os.pidfd_open(worker) for worker in workers]
    process.kill()
    process.wait(HANG)
    for handle in handles:
        ended, _, _ = select.select([handle], [], [], HANG)
        assert ended, "a worker outlives the run"
        os.close(handle)
    process.stderr.close()


@needs_proc
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_nothing_under_the_final_name(tmp_path, how):
    process = start(tmp_path)
    helpers = children(process.pid)
    process.send_signal(how)
    process.communicate(timeout=HANG)
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    assert visible(tmp_path / "out") == []
    until(lambda: not any(Path(f"/proc/{helper}").exists() for helper in helpers), "for workers that outlive the run")


def test_help_starts_quickly_and_refusals_have_no_traceback(tmp_path):
    assert "--tokenizer-type" in tool("--help").stdout
    done = tool("--input", tmp_path / "none", "--output-prefix", tmp_path / "x", "--tokenizer-type", "PretrainedFromHF")
    assert done.returncode == 1 and "does not exist" in done.stderr and "Traceback" not in done.stderr
    assert tool("--input", "x").returncode == 2
