"""Which files, which lines, and what becomes of each line."""

import gzip
import json
import os

import pytest

from megatron_mixtral.data.corpus.files import cut_chunks, list_inputs, natural_key
from megatron_mixtral.data.corpus.readers import LineCounts, lines_before, read_lines
from megatron_mixtral.data.corpus.records import REASONS, BadRecord, parse_record
from megatron_mixtral.errors import ConfigError, DataError


def touch(path, content=b'{"text": "a"}\n'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def names(inputs, root):
    return [os.path.relpath(file.path, root) for file in inputs.files]


def test_natural_order():
    assert sorted(["b/1", "a10.jsonl", "a2.jsonl", "a02.jsonl", "a.jsonl"], key=natural_key) == [
        "a02.jsonl", "a2.jsonl", "a10.jsonl", "a.jsonl", "b/1",
    ]  # fmt: skip


def test_folder_is_searched_in_natural_order(tmp_path):
    for name in ("10.jsonl", "2.jsonl", "1.json", "sub/3.jsonl", "readme.md", ".hidden.jsonl", ".git/0.jsonl",
                 "old.report.json"):  # fmt: skip
        touch(tmp_path / name)
    touch(tmp_path / "sub" / "4.jsonl.gz", gzip.compress(b"{}\n"))
    inputs = list_inputs([str(tmp_path)])
    assert names(inputs, tmp_path) == ["1.json", "2.jsonl", "10.jsonl", "sub/3.jsonl", "sub/4.jsonl.gz"]
    assert [os.path.basename(path) for path in inputs.ignored] == [".hidden.jsonl", "old.report.json", "readme.md"]
    assert [file.format for file in inputs.files] == ["plain"] * 4 + ["gzip"]


def test_folder_with_a_loop_of_links(tmp_path):
    touch(tmp_path / "a" / "0.jsonl")
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    assert names(list_inputs([str(tmp_path)]), tmp_path) == ["a/0.jsonl"]


def test_globs_and_several_inputs(tmp_path):
    for name in ("b/10.jsonl", "b/9.jsonl", "a/0.jsonl", "plain_name"):
        touch(tmp_path / name)
    given = [str(tmp_path / "plain_name"), str(tmp_path / "b" / "*.jsonl"), str(tmp_path / "a")]
    assert names(list_inputs(given), tmp_path) == ["plain_name", "b/9.jsonl", "b/10.jsonl", "a/0.jsonl"]
    assert names(list_inputs([str(tmp_path / "**" / "*.jsonl")]), tmp_path) == ["a/0.jsonl", "b/9.jsonl", "b/10.jsonl"]


def test_inputs_that_are_refused(tmp_path):
    file = str(touch(tmp_path / "a.jsonl"))
    empty = tmp_path / "empty"
    empty.mkdir()
    os.mkfifo(tmp_path / "pipe")
    touch(tmp_path / "x.csv", b"a,b")
    touch(tmp_path / "packed.jsonl", gzip.compress(b"{}"))
    touch(tmp_path / "plain.jsonl.gz", b"{}")
    for given, error, words in (
        ([], ConfigError, "names no file"),
        ([str(tmp_path / "none.jsonl")], ConfigError, "does not exist"),
        ([str(tmp_path / "none*.jsonl")], ConfigError, "no file matches"),
        ([str(empty)], ConfigError, "no file of this folder"),
        ([file, file], ConfigError, "twice"),
        ([file, str(tmp_path / "a*")], ConfigError, "twice"),
        ([str(tmp_path / "pipe")], DataError, "not a regular file"),
        ([str(tmp_path / "x.csv")], DataError, "this format is not read"),
        ([str(tmp_path / "packed.jsonl")], DataError, "holds gzip data"),
        ([str(tmp_path / "plain.jsonl.gz")], DataError, "named as a gzip file but is not one"),
    ):
        with pytest.raises(error, match=words):
            list_inputs(given)


def all_lines(path, chunk_bytes):
    inputs = list_inputs([str(path)])
    lines, total = [], LineCounts()
    for chunk in cut_chunks(inputs.files, chunk_bytes):
        counts = LineCounts()
        lines += read_lines(chunk, counts)
        total.lines += counts.lines
        total.blank += counts.blank
        total.bytes += counts.bytes
        total.boms += counts.boms
    return lines, total


CONTENTS = {
    "plain": b'{"a": 1}\n{"b": 22}\n{"c": 333}\n',
    "no newline at the end": b'{"a": 1}\n{"b": 22}',
    "blank lines": b'\n{"a": 1}\n\n  \t\r\n{"b": 22}\n\n\n',
    "crlf": b'{"a": 1}\r\n{"b": 22}\r\n',
    "one long line": b"[" + b"1," * 300 + b"1]\n{}\n",
    "bom": b'\xef\xbb\xbf{"a": 1}\n{"b": 2}\n',
    "bom inside": b'{"a": 1}\n\xef\xbb\xbf{"b": 2}\n',  # a file put behind another: the line is bad, and must stay so
    "separators inside": '{"a": "\u2028\u0085\x0b\x0c\x1c \rx"}\n{"b": 2}\n'.encode(),
    "only newlines": b"\n\n\n",
    "one byte": b"x",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_every_cut_gives_every_line_once(tmp_path, name):
    content = CONTENTS[name]
    path = touch(tmp_path / "x.jsonl", content)
    pieces = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = [piece for piece in pieces if piece.strip()]
    for chunk_bytes in [*range(1, 24), 100, 601, 1000]:
        lines, counts = all_lines(path, chunk_bytes)
        assert lines == expected, chunk_bytes
        assert counts.bytes == len(content) and counts.lines == len(pieces) - (pieces[-1] == b"")
        assert counts.blank == counts.lines - len(expected) and counts.boms == (name == "bom")


@pytest.mark.parametrize("name", CONTENTS)
def test_lines_before_every_place(tmp_path, name):
    """A piece owns the lines that begin in it, so before it are those that begin before: also the one under way."""
    content = CONTENTS[name]
    path = touch(tmp_path / "x.jsonl", content)
    begins = [0, *(place + 1 for place, byte in enumerate(content[:-1]) if byte == 10)]
    for step in (1, 7):
        for chunk in cut_chunks(list_inputs([str(path)]).files, step):
            assert lines_before(chunk) == sum(begin < chunk.start for begin in begins), chunk.start


def test_empty_file_and_gzip(tmp_path):
    assert all_lines(touch(tmp_path / "empty.jsonl", b""), 10) == ([], LineCounts())
    path = touch(tmp_path / "x.jsonl.gz", gzip.compress(CONTENTS["plain"]) + gzip.compress(b"{}\n"))
    lines, counts = all_lines(path, 4)
    assert len(lines) == 4 and counts.bytes == len(CONTENTS["plain"]) + 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "tail"])
def test_damaged_gzip_is_an_error(tmp_path, damage):
    content = bytearray(gzip.compress(os.urandom(500).hex().encode() * 3))
    if damage == "cut":
        del content[-40:]
    elif damage == "flipped":
        content[200] ^= 0xFF
    else:
        content += b"tail of rubbish"
    with pytest.raises(DataError, match="x.jsonl.gz: the gzip file is damaged or cut"):
        all_lines(touch(tmp_path / "x.jsonl.gz", bytes(content)), 10)


GOOD = {
    b'{"text": "a"}\r\n': "a",
    b'{"x": NaN, "text": "a", "y": [null, {"text": 1}]}': "a",
    b'{"text": "first", "text": "last"}': "last",
    b'{"text": "\\u0000 \\ud83d\\ude00 \\u2028"}': "\x00 \U0001f600 \u2028",
    '{"text": "\u2028\x85\ufeff\U0001f600"}'.encode(): "\u2028\x85\ufeff\U0001f600",
    b'{"text": ""}': "",
    b'{"text": "\\\\ud800"}': "\\ud800",
}


@pytest.mark.parametrize("line", GOOD)
def test_good_lines(line):
    assert parse_record(line, ("text",)) == (GOOD[line],)


BAD = [
    (b'{"text": "a"', "bad_json", "at column 13"),
    (b'{"text": "a"} {"text": "b"}', "bad_json", "Extra data at column 15"),
    (b'{"text": "a\tb"}', "bad_json", "control character"),
    (b'{"text": "a\x00b"}', "bad_json", "control character"),
    (b"{'text': 'a'}", "bad_json", "near"),
    (b"[" * 100_000, "bad_json", "recursion"),
    (b'{"text": ' + b"9" * 5000 + b"}", "not_a_string", "is a number"),
    (b"plain words", "bad_json", "plain words"),
    (b'{"text": "\xe9t\xe9"}', "bad_utf8", "byte 11 of the line"),
    (b'{"text": "\xed\xa0\x80"}', "bad_utf8", "byte 11"),
    ('{"text": "a"}'.encode("utf-16"), "bad_utf8", "byte 1 "),
    (b'["a"]', "not_an_object", "one record per line"),
    (b'"a"', "not_an_object", "a string"),
    (b"null", "not_an_object", "null"),
    (b'{"content": "a", "id": 3}', "missing_key", "no key 'text'; keys found: content, id"),
    (b"{}", "missing_key", "keys found: none"),
    (b'{"text": null}', "not_a_string", "is null"),
    (b'{"text": 12}', "not_a_string", "is a number"),
    (b'{"text": true}', "not_a_string", "is a boolean"),
    (b'{"text": ["a", "b"]}', "not_a_string", "is an array"),
    (b'{"text": {"a": 1}}', "not_a_string", "is an object"),
    (b'{"text": "half \\ud83d pair"}', "lone_surrogate", "half .ud83d pair"),
    (b'{"text": "\\udc00"}', "lone_surrogate", "udc00"),
]


@pytest.mark.parametrize(("line", "reason", "words"), BAD, ids=range(len(BAD)))
def test_bad_lines(line, reason, words):
    with pytest.raises(BadRecord, match=words) as caught:
        parse_record(line, ("text",))
    assert caught.value.reason == reason and len(str(caught.value)) < 400


def test_every_reason_is_tested():
    assert {reason for _, reason, _ in BAD} == set(REASONS)


def test_several_keys():
    line = json.dumps({"title": "t", "text": "x"}).encode()
    assert parse_record(line, ("text", "title")) == ("x", "t")
    with pytest.raises(BadRecord, match="'url'"):
        parse_record(line, ("text", "url"))
