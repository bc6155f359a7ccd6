"""A preprocessing run: bytes, counts, the outcome of each bad input, and what is left when a run ends early."""

import gzip
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from helpers.corpus import python_sources, write_jsonl

from megatron_mixtral.data import cli, preprocess_command
from megatron_mixtral.data import preprocess as preprocess_by_keywords
from megatron_mixtral.data.cli import parse_flags
from megatron_mixtral.data.processes import run_tasks
from megatron_mixtral.data.scratch import scratch_directory
from megatron_mixtral.data.text import TextOptions, run, workers
from megatron_mixtral.data.text import preprocess_text as preprocess
from megatron_mixtral.data.text.account import TextAccount
from megatron_mixtral.data.text.assemble import output_prefix
from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.tokenizer import mixtral_tokenizer_path

MODEL = str(mixtral_tokenizer_path())


@pytest.fixture(scope="module")
def reference():
    return sentencepiece.SentencePieceProcessor(model_file=MODEL)


def options(tmp_path, *inputs, **changes):
    settings = {"append_eod": True, "tokenizer_type": "Llama2Tokenizer", **changes}
    return TextOptions(tuple(map(str, inputs)), str(tmp_path / "out" / "set"), MODEL, **settings)


def read(prefix, key="text"):
    """The documents of a dataset as lists of ids, read without the engine."""
    base = output_prefix(str(prefix), key)
    index = open(base + ".idx", "rb").read()
    count = int.from_bytes(index[18:26], "little")
    lengths = np.frombuffer(index, dtype="<i4", count=count, offset=34)
    ids = np.fromfile(base + ".bin", dtype="<u2")
    assert ids.size == lengths.sum()
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def contents(tmp_path):
    out = tmp_path / "out"
    return {path.name: path.read_bytes() for path in [*out.glob("set*"), *out.glob("reports/*")]}


def left(tmp_path):
    out = tmp_path / "out"
    return sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) if out.exists() else []


def test_ids_order_and_report(tmp_path, reference):
    texts = python_sources(60)
    write_jsonl(tmp_path / "in" / "10.jsonl", texts[40:])
    write_jsonl(tmp_path / "in" / "9.jsonl.gz", texts[20:40])
    write_jsonl(tmp_path / "in" / "1.json", texts[:20])
    report = preprocess(options(tmp_path, tmp_path / "in", prepend_bod=True))
    documents = read(tmp_path / "out" / "set")
    assert documents == [[1, *reference.encode(text), 2] for text in texts]
    assert left(tmp_path) == ["reports", "set_text_document.bin", "set_text_document.idx"]
    assert json.loads((tmp_path / "out" / "reports" / "set.report.json").read_text()) == report
    counts = report["keys"]["text"]
    assert (report["lines"], report["records"], counts["documents"], counts["empty"]) == (60, 60, 60, 0)
    assert counts["tokens"] == sum(map(len, documents)) == counts["bin_bytes"] // 2
    assert counts["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert report["tokenizer"]["sha256"] == "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
    assert [os.path.basename(file["path"]) for file in report["inputs"]] == ["1.json", "9.jsonl.gz", "10.jsonl"]
    assert [file["lines"] for file in report["inputs"]] == [20, 20, 20]


def test_where_the_cuts_lie_does_not_show(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", python_sources(25))
    preprocess(options(tmp_path, path))
    expected = [(tmp_path / "out" / f"set_text_document{end}").read_bytes() for end in (".bin", ".idx")]
    for chunk_bytes in (100, 4099, 65536):
        preprocess(options(tmp_path, path, chunk_bytes=chunk_bytes))
        assert [(tmp_path / "out" / f"set_text_document{e}").read_bytes() for e in (".bin", ".idx")] == expected


def test_batches_inside_a_chunk(tmp_path, monkeypatch, reference):
    monkeypatch.setattr(workers, "BATCH_CHARACTERS", 10)
    texts = ["a", "b" * 30, "", "c d e f g h i j k", "x"]
    report = preprocess(options(tmp_path, write_jsonl(tmp_path / "x.jsonl", texts)))
    assert read(tmp_path / "out" / "set") == [[*reference.encode(text), 2] for text in texts if text]
    assert report["keys"]["text"]["empty"] == 1


def test_several_keys(tmp_path, reference):
    lines = [{"text": "one", "title": "A"}, {"text": "", "title": "B"}, {"text": "three", "title": ""}]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = preprocess(options(tmp_path, path, keys=("text", "title"), append_eod=False))
    prefix = tmp_path / "out" / "set"
    assert read(prefix) == [reference.encode("one"), reference.encode("three")]
    assert read(prefix, "title") == [reference.encode("A"), reference.encode("B")]
    assert [report["keys"][key]["empty"] for key in ("text", "title")] == [1, 1]


BAD_LINE = {
    "bad_json": b'{"text": "a',
    "bad_utf8": b'{"text": "\xff"}',
    "not_an_object": b"[1, 2]",
    "missing_key": b'{"content": "a"}',
    "not_a_string": b'{"text": null}',
    "lone_surrogate": b'{"text": "\\ud800"}',
}


@pytest.mark.parametrize("reason", BAD_LINE)
def test_a_bad_line_stops_with_its_place_or_is_counted(tmp_path, reason, reference):
    good = b'{"text": "good %d"}\n'
    lines = [good % number for number in range(40)]
    lines.insert(17, BAD_LINE[reason] + b"\n")
    lines.insert(3, b"\n")
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(lines))
    for chunk_bytes in (50, 1 << 20):
        with pytest.raises(DataError, match=rf"x\.jsonl:19: {reason}: .*--on-error skip"):
            preprocess(options(tmp_path, path, chunk_bytes=chunk_bytes))
        assert left(tmp_path) == []
    report = preprocess(options(tmp_path, path, on_error="skip", chunk_bytes=50))
    assert read(tmp_path / "out" / "set") == [[*reference.encode(f"good {n}"), 2] for n in range(40)]
    assert (report["lines"], report["blank_lines"], report["records"]) == (42, 1, 41)
    assert report["skipped"] == {reason: 1}
    assert report["skipped_records"][0]["where"] == f"{path}:19"


def test_bom_crlf_and_blank_lines_are_read(tmp_path, reference):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": " b\\u0000"}')
    report = preprocess(options(tmp_path, path))
    assert read(tmp_path / "out" / "set") == [[*reference.encode("a"), 2], [*reference.encode(" b\x00"), 2]]
    assert (report["lines"], report["blank_lines"], report["byte_order_marks_removed"]) == (3, 1, 1)


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n'])
def test_nothing_to_write_is_an_error(tmp_path, content):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="No document with text"):
        preprocess(options(tmp_path, path))
    assert left(tmp_path) == []


def test_an_older_output_survives_a_failed_run(tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", ["a b c"])
    (tmp_path / "bad.jsonl").write_text("{}\n")
    preprocess(options(tmp_path, good))
    before = contents(tmp_path)
    with pytest.raises(DataError):
        preprocess(options(tmp_path, tmp_path / "bad.jsonl"))
    assert contents(tmp_path) == before and len(before) == 3
    preprocess(options(tmp_path, write_jsonl(tmp_path / "other.jsonl", ["d"])))
    assert len(read(tmp_path / "out" / "set")) == 1


def test_a_changed_input_is_noticed(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "x.jsonl", ["a"] * 5)
    real = run.cut_chunks

    def grow_after_listing(files, *how):
        with open(path, "ab") as stream:
            stream.write(b"   ")
        with open(path, "r+b") as stream:
            stream.truncate(30)
        return real(files, *how)

    monkeypatch.setattr(run, "cut_chunks", grow_after_listing)
    with pytest.raises(DataError, match="70 bytes were listed, it ends before"):
        preprocess(options(tmp_path, path, on_error="skip"))
    assert left(tmp_path) == []


def test_lost_documents_are_noticed(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "x.jsonl", ["a"] * 5)
    real = workers._PartWriter.add

    def forgetful(self, texts):
        real(self, texts[: 3 - self._characters])

    monkeypatch.setattr(workers._PartWriter, "add", forgetful)
    with pytest.raises(DataError, match="do not add up: 5 records, but 3 documents"):
        preprocess(options(tmp_path, path))
    assert left(tmp_path) == []


def test_a_second_run_on_the_same_prefix_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", ["a"])
    with scratch_directory(str(tmp_path / "out" / "set")) as scratch:
        (scratch / "part-00000000-0.ids").write_bytes(b"others")
        with pytest.raises(ConfigError, match="another run is writing"):
            preprocess(options(tmp_path, path))
        assert (scratch / "part-00000000-0.ids").exists()
    assert left(tmp_path) == []


def test_what_a_killed_run_left_is_cleared(tmp_path):
    stale = tmp_path / "out" / ".set.preprocess"
    stale.mkdir(parents=True)
    for name in ("lock", "part-00000000-0.ids", "set_text_document.bin.tmp"):
        (stale / name).write_bytes(b"torn")
    preprocess(options(tmp_path, write_jsonl(tmp_path / "x.jsonl", ["a"])))
    assert left(tmp_path) == ["reports", "set_text_document.bin", "set_text_document.idx"]


@pytest.mark.parametrize("how", [KeyboardInterrupt, "term"])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, how):
    path = write_jsonl(tmp_path / "x.jsonl", ["a b"] * 50)
    real, signalled = TextAccount.add, []

    def interrupted(self, chunk, result):
        if chunk.start == 300 and not signalled:
            signalled.append(True)
            if how is KeyboardInterrupt:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, chunk, result)

    monkeypatch.setattr(TextAccount, "add", interrupted)
    monkeypatch.setattr(cli, "parse_flags", lambda argv, environ: options(tmp_path, path, chunk_bytes=100))
    with pytest.raises(KeyboardInterrupt):
        preprocess_command([])
    assert left(tmp_path) == []


def test_flags_that_are_refused(tmp_path):
    always = ["--input", "x", "--output-prefix", "p"]
    llama = [*always, "--tokenizer-type", "Llama2Tokenizer"]
    given = [*llama, "--tokenizer-model", MODEL]
    for argv, words in (
        (llama, "needs --tokenizer-model"),
        ([*llama, "--tokenizer-model"], "needs --tokenizer-model"),
        ([*given, "--dataset-impl", "lazy"], "only mmap"),
        ([*given, "--handler-name", "Nobody"], "is not one of: none, auto"),
        ([*given, "--split-sentences"], "--split-sentences, .* are gone"),
        ([*given, "--pack"], "--pack: for instruction data only"),
        ([*given, "--num-shards", "2", "--shard-index", "2"], "from 0 to 1"),
        ([*given, "--workers", "0"], "at least 1"),
        ([*given, "--json-keys", "a", "a"], "each once"),
        ([*given, "--json-keys", "a/b"], "file name"),
        ([*given, "--tokenizer-name-or-path", "/elsewhere"], "differ"),
        ([*given, "--output-prefix", "dir/"], "must end in a name"),
        ([*always, "--tokenizer-type", "GPT2BPETokenizer"], "not one of"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_flags(argv, {})
    for unknown in ("--keep-newline", "--partitions=2"):
        with pytest.raises(SystemExit) as caught:
            parse_flags([*given, unknown], {})
        assert caught.value.code == 2


def test_flags_of_all_spellings():
    always = ["--input", "x", "y", "--output-prefix", "p"]
    parsed = parse_flags(
        [*always, "--tokenizer-type", "PretrainedFromHF", "--tokenizer-name-or-path", "d", "--json_keys", "a", "b",
         "--dataset-impl", "mmap", "--append-eod", "--tokenizer-not-use-fast", "--handler-name", "none",
         "--workers", "3"], {}
    )  # fmt: skip
    assert (parsed.inputs, parsed.keys, parsed.tokenizer_path, parsed.workers) == (("x", "y"), ("a", "b"), "d", 3)
    assert parsed.append_eod and not parsed.prepend_bod
    empty = [*always, "--tokenizer-type", "PretrainedTokenizerFromHF", "--tokenizer-model", "--append-eod"]
    assert parse_flags(empty, {}).tokenizer_path == MODEL
    assert parse_flags(empty, {"MIXTRAL_HUGGINGFACE_PATH": "/models/m"}).tokenizer_path == "/models/m"


def test_eod_without_an_eos_token_is_refused(tmp_path):
    from examples.quickstart.hf_tokenizer import write_hf_tokenizer

    write_hf_tokenizer(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"eos_token": null}')
    (tmp_path / "hf" / "tokenizer.model").unlink()
    path = write_jsonl(tmp_path / "x.jsonl", ["a"])
    chosen = TextOptions((str(path),), str(tmp_path / "out" / "set"), str(tmp_path / "hf"), append_eod=True)
    with pytest.raises(ConfigError, match="--append-eod needs the eos_token"):
        preprocess(chosen)


def test_the_function_with_keywords(tmp_path, reference):
    path = write_jsonl(tmp_path / "x.jsonl", ["a b", "c"], key="body")
    report = preprocess_by_keywords(path, tmp_path / "out" / "set", tokenizer=MODEL, keys=("body",), append_eod=True)
    assert read(tmp_path / "out" / "set", "body") == [[*reference.encode(text), 2] for text in ("a b", "c")]
    assert report["keys"]["body"]["documents"] == 2
    write_jsonl(tmp_path / "y.jsonl", ["all of it"])
    report = preprocess_by_keywords([path.with_name("y.jsonl")], tmp_path / "out" / "y", tokenizer=MODEL,
                                    handler="pretrain", seq_length=8)  # fmt: skip
    assert report["rows"] == 1 and report["prompt_type"] == "raw"
    for settings, words in (({"pack": True}, "plain text has no setting pack"),
                            ({"handler": "auto", "keys": ("text",)}, "dialogues has no setting keys")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            preprocess_by_keywords(path, tmp_path / "out" / "z", tokenizer=MODEL, **settings)


class FullDisk:
    """Work that finds the disk full."""

    def run(self, task):
        raise OSError(28, "No space left on device")

    def place(self, task):
        return f"task {task}"


@pytest.mark.parametrize("count", [1, 2])
def test_a_full_disk_is_told_with_its_place_and_need(tmp_path, count):
    """The work, here or in a worker, knows neither; the run has nothing else to say."""
    prefix = tmp_path / "out" / "set"
    with pytest.raises(DataError, match=rf"^--output-prefix {prefix}: the disk of {prefix.parent} is full.*2 GB"):
        with scratch_directory(str(prefix), 2 * 10**9) as scratch:
            (scratch / "part-1.ids").write_bytes(b"kept")
            list(run_tasks(range(3), FullDisk(), count))
    assert (scratch / "part-1.ids").exists()


def test_a_full_disk_ends_preprocessing_with_a_sentence(tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workers._PartWriter, "write_batch", full)
    path = write_jsonl(tmp_path / "x.jsonl", ["some text"] * 1000)
    with pytest.raises(DataError, match=r"out is full: .* free, about \d+\.?\d* kB needed"):
        preprocess(options(tmp_path, path))


def test_the_bad_lines_that_are_listed_are_as_many_as_the_documents_say(tmp_path):
    lines = [b'{"text": "good"}\n', *[b"{}\n"] * 1500]
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
    words = " ".join((Path(__file__).parents[4] / "docs" / "data.md").read_text(encoding="utf-8").split())
    said = re.search(r"listed there and logged: the first ([\d,]+) of each piece .* at most ([\d,]+) of a run", words)
    for name, expected in (("y.jsonl.gz", said[1]), ("x.jsonl", said[2])):  # one piece, and 31
        report = preprocess(options(tmp_path, tmp_path / name, on_error="skip", chunk_bytes=150))
        assert report["skipped"] == {"missing_key": 1500}
        assert f"{len(report['skipped_records']):,}" == expected
