"""Shards, merged datasets and their inspection, against the engine's builder."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.corpus import python_sources, write_jsonl
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_mixtral.data import inspect_dataset_command, merge_command
from megatron_mixtral.data.indexed import merging
from megatron_mixtral.data.indexed.inspection import inspect
from megatron_mixtral.data.indexed.merging import merge
from megatron_mixtral.data.indexed.writer import IndexedWriter
from megatron_mixtral.data.report import find_report
from megatron_mixtral.data.text import TextOptions, preprocess_text
from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.tokenizer import mixtral_tokenizer_path

MODEL = str(mixtral_tokenizer_path())


def run(tmp_path, inputs, name="set", **changes):
    settings = {"append_eod": True, "tokenizer_type": "Llama2Tokenizer", **changes}
    prefix = str(tmp_path / name)
    preprocess_text(TextOptions(tuple(map(str, inputs)), prefix, MODEL, **settings))
    return f"{prefix}_text_document"


def pair(prefix):
    return [Path(f"{prefix}{end}").read_bytes() for end in (".bin", ".idx")]


@pytest.fixture
def corpus(tmp_path):
    texts = python_sources(90, largest=9000)
    return [write_jsonl(tmp_path / "in" / name, part) for name, part in
            {"0.jsonl": texts[:50], "1.jsonl.gz": texts[50:60], "2.jsonl": texts[60:]}.items()]  # fmt: skip


def test_shards_merged_in_order_are_the_whole(tmp_path, corpus):
    whole = run(tmp_path, corpus)
    for count in (2, 3):
        shards = []
        for index in range(count):
            run(tmp_path, corpus, f"s{count}", num_shards=count, shard_index=index)
            shards.append(str(tmp_path / f"s{count}-{index:05d}-of-{count:05d}_text_document"))
        assert all(0 < len(pair(shard)[0]) < len(pair(whole)[0]) for shard in shards)
        report = merge([*reversed(shards)], str(tmp_path / f"merged{count}"))
        assert pair(tmp_path / f"merged{count}") == pair(whole)
        assert report["documents"] == 90 and report["tokenizer"]["sha256"].startswith("dadfd56d")
    with pytest.raises(DataError, match=r"\[1\] are missing"):
        merge([shards[0], shards[2]], str(tmp_path / "x"))
    with pytest.raises(DataError, match=r"they come in the order \[1, 0, 2\]"):
        merge([shards[1], shards[0], shards[2]], str(tmp_path / "x"), natural_order=False)
    assert not list(tmp_path.glob("x*"))


def test_an_interrupted_merge_leaves_nothing_and_promises_nothing(tmp_path, corpus, monkeypatch, caplog):
    """It cannot be taken up, so its files go, and nobody is told that the same command goes on."""
    parts = [run(tmp_path, [one], f"p{number}") for number, one in enumerate(corpus)]
    append = merging._append

    def full(writer, dataset):
        append(writer, dataset)
        if dataset.prefix == parts[1]:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging, "_append", full)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DataError, match=rf"the disk of {tmp_path} is full: .* free, about .* needed in all"):
        merge(parts, str(tmp_path / "x"))
    assert sorted(path.name for path in tmp_path.iterdir()) == before and "goes on from there" not in caplog.text


def test_a_bad_line_of_a_shard_has_the_line_number_of_its_file(tmp_path):
    lines = [b'{"text": "a %d"}\n' % number for number in range(20000)]
    lines[17000] = b"{}\n"
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=r"x\.jsonl:17001: missing_key"):
        run(tmp_path, [path], num_shards=2, shard_index=1)
    run(tmp_path, [path], num_shards=2, shard_index=0)
    with pytest.raises(ConfigError, match="gets nothing: the input has only"):
        run(tmp_path, [path], num_shards=900, shard_index=899)


def engine_merge(prefixes, output):
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=DType.optimal_dtype(32000))
    for prefix in prefixes:
        builder.add_index(prefix)
    builder.finalize(f"{output}.idx")


def several_sequences(prefix, seed):
    """A dataset of the engine's builder whose documents have one to five sequences."""
    draw = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(32000))
    for _ in range(40):
        lengths = draw.integers(1, 30, size=draw.integers(1, 6)).tolist()
        builder.add_document(torch.from_numpy(draw.integers(0, 32000, sum(lengths))), lengths)
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.mark.parametrize("block", [3, 1 << 20])
def test_documents_of_several_sequences_as_the_engine_merges_them(tmp_path, monkeypatch, block):
    monkeypatch.setattr(merging, "BLOCK", block)
    prefixes = [several_sequences(tmp_path / f"d{number}", number) for number in (2, 10)]
    engine_merge(prefixes, tmp_path / "engine")
    assert merge_command(["--input", *(f"{p}.idx" for p in reversed(prefixes)),
                                   "--output-prefix", str(tmp_path / "ours")]) == 0  # fmt: skip
    assert pair(tmp_path / "ours") == pair(tmp_path / "engine")
    assert len(IndexedDataset(str(tmp_path / "ours")).document_indices) == 81
    assert inspect(str(tmp_path / "ours")).problems == []


def test_what_does_not_belong_together_is_refused(tmp_path, corpus):
    first = run(tmp_path, corpus[:1], "a")
    with pytest.raises(DataError, match="prepend_bod False, .* has True"):
        merge([first, run(tmp_path, corpus[:1], "b", prepend_bod=True)], str(tmp_path / "x"))
    wide = tmp_path / "wide"
    (tmp_path / "scratch").mkdir()
    writer = IndexedWriter(wide, np.dtype(np.int32), tmp_path / "scratch")
    writer.add(np.arange(3, dtype=np.int32), np.array([3], dtype=np.int32))
    writer.finish()
    writer.publish()
    writer.close()
    with pytest.raises(DataError, match="uint16 and .*wide int32"):
        merge([first, str(wide)], str(tmp_path / "x"))
    second = run(tmp_path, corpus[2:], "c")
    report = json.loads((tmp_path / "reports" / "c.report.json").read_text())
    report["tokenizer"]["sha256"] = "0" * 64
    (tmp_path / "reports" / "c.report.json").write_text(json.dumps(report))
    with pytest.raises(DataError, match="different tokenizers"):
        merge_command(["--input", first, second, "--output-prefix", str(tmp_path / "x")])
    for wrong in ([first], [first, first]):
        with pytest.raises(ConfigError, match="at least two different"):
            merge(wrong, str(tmp_path / "x"))
    assert not list(tmp_path.glob("x*"))


def test_every_file_of_the_folder_is_half_of_a_pair(tmp_path, corpus):
    """The rule of Megatron-LM's own tools/merge_datasets.py, which refuses the folder where it does not hold."""
    run(tmp_path, corpus[:1], "out/a"), run(tmp_path, corpus[2:], "out/b")
    merge([str(tmp_path / "out" / f"{name}_text_document") for name in "ab"], str(tmp_path / "out" / "c"))
    files = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_file())
    assert files == [name + end for name in ("a_text_document", "b_text_document", "c") for end in (".bin", ".idx")]


def test_a_report_of_an_earlier_release_is_found_beside_its_dataset(tmp_path, corpus):
    old, prefix = tmp_path / "set.report.json", run(tmp_path, corpus[:1])
    assert find_report(prefix)["tokenizer"]["sha256"].startswith("dadfd56d")
    (tmp_path / "reports" / "set.report.json").rename(old)
    assert find_report(prefix)["tokenizer"]["sha256"].startswith("dadfd56d") and inspect(prefix).problems == []
    run(tmp_path, corpus[2:])  # another data set of this name: the old report does not speak of it
    assert not old.exists() and inspect(prefix).problems == []


def test_inspection_counts_and_decodes(tmp_path, corpus, capsys):
    prefix = run(tmp_path, corpus)
    assert inspect_dataset_command([prefix + ".idx", "--show", "3"]) == 0
    shown = capsys.readouterr().out
    dataset = IndexedDataset(prefix)  # a name: its arrays are views of a map that ends with it
    lengths = dataset.sequence_lengths
    assert re.search(rf"^  tokens +{lengths.sum()}$", shown, re.M) and "  whole\n" in shown
    assert re.search(rf"end with EOS +{len(lengths)}$", shown, re.M) and "[0] " in shown and "[89] " in shown
    first = json.loads(corpus[0].read_text().splitlines()[0])["text"]
    assert first[:40] in shown


def test_inspection_finds_damage(tmp_path, corpus, capsys):
    prefix = run(tmp_path, corpus[:1])
    index = bytearray(Path(prefix + ".idx").read_bytes())
    count = int.from_bytes(index[18:26], "little")
    pointers = 34 + 4 * count
    for at, value, words in ((pointers + 8, 9, "sequence 1 should begin at byte"),
                             (pointers + 8 * count, 1, "do not cover"),
                             (pointers + 8 * count + 16, 0, "decrease")):  # fmt: skip
        damaged = bytearray(index)
        damaged[at : at + 8] = value.to_bytes(8, "little")
        Path(prefix + ".idx").write_bytes(damaged)
        assert any(words in problem for problem in inspect(prefix).problems), words
    Path(prefix + ".idx").write_bytes(index)
    assert inspect(prefix).problems == []
    assert any("the vocabulary has 100" in problem for problem in inspect(prefix, 100).problems)
    report = json.loads((tmp_path / "reports" / "set.report.json").read_text())
    report["keys"]["text"]["documents"] += 1
    (tmp_path / "reports" / "set.report.json").write_text(json.dumps(report))
    assert inspect_dataset_command([prefix]) == 1
    assert f"the report says {count + 1} documents, found {count}" in capsys.readouterr().out
    with open(prefix + ".bin", "ab") as stream:
        stream.write(b"\0")
    with pytest.raises(DataError, match="are not of one data set"):
        inspect_dataset_command([prefix])
