"""Small files that are wrong in some way: each has a documented outcome, and none hangs or leaves half an output.

docs/data.md has the table of outcomes. Each file holds good lines around the doubtful one.
"""

import gzip
import importlib.util
import io
import json
import logging
import signal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_mixtral.data import preprocess_command
from megatron_mixtral.errors import MixtralError
from megatron_mixtral.tokenizer import mixtral_tokenizer_path

TIME_LIMIT = 20  # seconds for each file
GOOD = b'{"text": "good"}\n'


def plain(line: bytes) -> bytes:
    return GOOD * 2 + line + b"\n" + GOOD


def parquet(values: list | pyarrow.Array, kind: pyarrow.DataType | None = None, name: str = "text") -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({name: pyarrow.array(values, kind)}), stream)
    return stream.getvalue()


def not_utf8(values: list[bytes]) -> pyarrow.Array:
    """A column that calls itself a string and holds any bytes, as careless writers make it."""
    return pyarrow.StringArray.from_buffers(len(values), *pyarrow.array(values, pyarrow.binary()).buffers()[1:])


# name of the file -> (content, what stands in the third line: None for a document, "" for nothing, or the reason).
LINES: dict[str, tuple[bytes, str | None]] = {
    "bad_json.jsonl": (plain(b'{"text": "a'), "bad_json"),
    "single_quotes.jsonl": (plain(b"{'text': 'a'}"), "bad_json"),
    "two_objects.jsonl": (plain(b'{"text": "a"} {"text": "b"}'), "bad_json"),
    "trailing_comma.jsonl": (plain(b'{"text": "a"},'), "bad_json"),
    "raw_tab_in_text.jsonl": (plain(b'{"text": "a\tb"}'), "bad_json"),
    "raw_nul.jsonl": (plain(b'{"text": "a\x00b"}'), "bad_json"),
    "only_nul.jsonl": (plain(b"\x00" * 100), "bad_json"),
    "deep.jsonl": (plain(b"[" * 100_000), "bad_json"),
    "plain_words.jsonl": (plain(b"These are words."), "bad_json"),
    "bom_in_the_middle.jsonl": (plain(b'\xef\xbb\xbf{"text": "a"}'), "bad_json"),
    "bad_utf8.jsonl": (plain(b'{"text": "\xff"}'), "bad_utf8"),
    "surrogate_in_utf8.jsonl": (plain(b'{"text": "\xed\xa0\x80"}'), "bad_utf8"),
    "latin1.jsonl": (plain('{"text": "caf\xe9"}'.encode("latin-1")), "bad_utf8"),
    "missing_key.jsonl": (plain(b'{"content": "a"}'), "missing_key"),
    "empty_object.jsonl": (plain(b"{}"), "missing_key"),
    "null.jsonl": (plain(b'{"text": null}'), "not_a_string"),
    "number.jsonl": (plain(b'{"text": 12}'), "not_a_string"),
    "list_of_strings.jsonl": (plain(b'{"text": ["a", "b"]}'), "not_a_string"),
    "long_number.jsonl": (plain(b'{"text": ' + b"9" * 5000 + b"}"), "not_a_string"),
    "array.jsonl": (plain(b'[{"text": "a"}]'), "not_an_object"),
    "bare_string.jsonl": (plain(b'"text"'), "not_an_object"),
    "lone_surrogate.jsonl": (plain(b'{"text": "a\\ud800"}'), "lone_surrogate"),
    "null.parquet": (parquet(["good", "good", None, "good"]), "not_a_string"),
    "bad_utf8.parquet": (parquet(not_utf8([b"good", b"good", b"\xff", b"good"])), "bad_utf8"),
    "bad_gz_line.jsonl.gz": (gzip.compress(plain(b"{}")), "missing_key"),
    "bad_zst_line.jsonl.zst": (zstandard.compress(plain(b"{}")), "missing_key"),
    "blank.jsonl": (plain(b""), ""),
    "spaces.jsonl": (plain(b"  \t "), ""),
    "empty_text.jsonl": (plain(b'{"text": ""}'), ""),
    "bom.jsonl": (b"\xef\xbb\xbf" + plain(b'{"text": "a"}'), None),
    "crlf.jsonl": (plain(b'{"text": "a"}').replace(b"\n", b"\r\n"), None),
    "no_newline_at_the_end.jsonl": (plain(b'{"text": "a"}')[:-1], None),
    "duplicate_keys.jsonl": (plain(b'{"text": "b", "text": "a"}'), None),
    "nan.jsonl": (plain(b'{"x": NaN, "text": "a", "y": -Infinity, "z": 1e999}'), None),
    "escaped_nul.jsonl": (plain(b'{"text": "a\\u0000"}'), None),
    "surrogate_elsewhere.jsonl": (plain(b'{"other": "\\ud800", "text": "a"}'), None),
    "separators.jsonl": (plain('{"text": "a\u2028\u2029\x85b"}'.encode()), None),
    "frames.jsonl.zst": (zstandard.compress(GOOD * 2) + zstandard.compress(b'{"text": "a"}\n' + GOOD), None),
    "two_members.jsonl.gz": (gzip.compress(GOOD * 2) + gzip.compress(b'{"text": "a"}\n' + GOOD), None),
    "column.parquet": (parquet(["good", "good", "a", "good"], pyarrow.large_string()), None),
}

BIG = b"".join(b'{"text": "%d"}\n' % number for number in range(9999))
PACKED = zstandard.ZstdCompressor(write_checksum=True).compress(BIG)  # as the zstd program writes it
TORN = b'{"text": "good"|\n'  # what damage makes of a line; a checksum at the end of the packed file says so


def stored_zstd(text: bytes) -> bytes:
    """A Zstandard file of `text` in blocks as they are, with a checksum that does not fit."""
    blocks = [text[start : start + 100_000] for start in range(0, len(text), 100_000)]
    headers = [(len(block) << 3 | (block is blocks[-1])).to_bytes(3, "little") for block in blocks]
    return b"\x28\xb5\x2f\xfd\x04\x58" + b"".join(map(b"".join, zip(headers, blocks, strict=True))) + b"\0" * 4


WIDE = b"\x28\xb5\x2f\xfd\x00\xb0" + b"\x01\x00\x00"  # its window is 4 GiB: unpacking would need as much memory

# Files that are an error whatever --on-error says: name -> (content, words of the error).
FILES: dict[str, tuple[bytes, str]] = {
    "empty.jsonl": (b"", "No document with text"),
    "only_blank.jsonl": (b"\n \n\r\n", "No document with text"),
    "only_empty_texts.jsonl": (b'{"text": ""}\n' * 3, "No document with text"),
    "cut.jsonl.gz": (gzip.compress(BIG)[:-30], "cut.jsonl.gz: the gzip file is damaged or cut"),
    "flipped.jsonl.gz": (gzip.compress(BIG)[:500] + b"\0" * 40 + gzip.compress(BIG)[540:], "the gzip file is damaged"),
    "flipped_text.jsonl.gz": (gzip.compress(GOOD * 99_999, 0).replace(GOOD, TORN, 1), "the gzip file is damaged"),
    "rubbish_at_the_end.jsonl.gz": (gzip.compress(BIG) + b"rubbish", "the gzip file is damaged"),
    "cut.jsonl.zst": (zstandard.compress(BIG)[:-30], "cut.jsonl.zst: the zstd file is damaged or cut"),
    "flipped.jsonl.zst": (PACKED[:500] + b"\xff" * 40 + PACKED[540:], "the zstd file is damaged"),
    "flipped_text.jsonl.zst": (stored_zstd(TORN + GOOD * 10_000), "the zstd file is damaged"),
    "rubbish_at_the_end.jsonl.zst": (zstandard.compress(BIG) + b"rubbish", "the zstd file is damaged"),
    "wide.jsonl.zst": (WIDE, "requires too much memory"),
    "cut.parquet": (parquet(["good"] * 999)[:-100], "damaged Parquet file"),
    "no_column.parquet": (parquet(["a"], name="content"), "no column 'text'; columns: content"),
    "numbers.parquet": (parquet([1, 2], pyarrow.int64()), "column 'text' holds int64, not strings"),
    "gzip_named_plain.jsonl": (gzip.compress(GOOD), "holds gzip data"),
    "plain_named_gzip.jsonl.gz": (GOOD, "is not one"),
    "words.csv": (b"text\ngood\n", "this format is not read"),
}


@pytest.fixture(autouse=True)
def time_limit():
    def late(signum, frame):
        raise AssertionError(f"more than {TIME_LIMIT} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(TIME_LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def main(flags: list[str]) -> int:
    """The exit status, with the error in the log, as the program has it."""
    try:
        return preprocess_command(flags)
    except MixtralError as error:
        logging.error("error: %s", error)
        return 1


def run(tmp_path: Path, name: str, content: bytes, *flags: str) -> int:
    (tmp_path / name).write_bytes(content)
    return main(["--input", str(tmp_path / name), "--output-prefix", str(tmp_path / "out" / "set"), "--workers", "1",
                 "--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", str(mixtral_tokenizer_path()),
                 "--tokenizer-engine", "sentencepiece", "--append-eod", *flags])  # fmt: skip


def output(tmp_path: Path) -> list[str]:
    folder = tmp_path / "out"
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.exists() else []


@pytest.mark.parametrize("name", LINES)
def test_a_doubtful_line(tmp_path, caplog, name):
    caplog.set_level(logging.INFO)
    content, reason = LINES[name]
    if reason:
        assert run(tmp_path, name, content) == 1 and output(tmp_path) == []
        [error] = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert error.startswith(f"error: {tmp_path / name}:3: {reason}: ") and len(error) < 600, error
    assert run(tmp_path, name, content, *(["--on-error", "skip"] if reason else [])) == 0
    report = json.loads((tmp_path / "out" / "reports" / "set.report.json").read_text())
    counts = report["keys"]["text"]
    assert counts["documents"] == (4 if reason is None else 3)
    assert report["skipped"] == ({reason: 1} if reason else {})
    assert report["lines"] == 4 == counts["documents"] + counts["empty"] + report["blank_lines"] + bool(reason)
    assert [line["where"] for line in report["skipped_records"]] == ([f"{tmp_path / name}:3"] if reason else [])
    assert output(tmp_path) == ["reports", "set_text_document.bin", "set_text_document.idx"]
    assert (tmp_path / "out" / "set_text_document.bin").stat().st_size == counts["bin_bytes"]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_an_error(tmp_path, caplog, name, on_error):
    content, words = FILES[name]
    assert run(tmp_path, name, content, "--on-error", on_error) == 1
    [error] = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert words in error and len(error) < 600, error
    assert output(tmp_path) == []


@pytest.mark.parametrize(("package", "name"), [("zstandard", "frames.jsonl.zst"), ("pyarrow", "column.parquet")])
def test_a_missing_package_is_named(tmp_path, caplog, monkeypatch, package, name):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == package else real(wanted))
    assert run(tmp_path, name, LINES[name][0]) == 1
    assert f"install the package {package}" in caplog.text and output(tmp_path) == []


def test_all_of_them_in_one_run(tmp_path):
    """Together, over processes: each doubtful line is counted, none disturbs another file."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, (content, _) in LINES.items():
        (folder / name).write_bytes(content)
    flags = ["--input", str(folder), "--output-prefix", str(tmp_path / "out" / "set"), "--workers", "2",
             "--on-error", "skip", "--tokenizer-type", "Llama2Tokenizer",
             "--tokenizer-model", str(mixtral_tokenizer_path())]  # fmt: skip
    assert main(flags) == 0
    report = json.loads((tmp_path / "out" / "reports" / "set.report.json").read_text())
    reasons = [reason for _, reason in LINES.values()]
    assert report["skipped"] == {reason: reasons.count(reason) for reason in sorted(set(filter(None, reasons)))}
    assert report["keys"]["text"]["documents"] == 3 * len(LINES) + reasons.count(None)
