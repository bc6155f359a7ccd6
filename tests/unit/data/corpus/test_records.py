"""Records read by `msgspec` have the texts and the errors that the standard library gives them."""

import itertools
import json
import random

import pytest
from helpers import json_fuzz

from megatron_mixtral.data.corpus import records
from megatron_mixtral.data.corpus.records import BadRecord, parse_record

KEYS = ("text", "b")


def outcome(parse, line, keys=KEYS):
    try:
        return parse(line, keys)
    except BadRecord as error:
        return error.reason, str(error)


def test_random_and_damaged_lines():
    good = 0
    for line in itertools.islice(json_fuzz.random_lines(seed=1), 30_000):
        expected = outcome(records._slow_texts, line)
        assert outcome(parse_record, line) == expected, line
        good += expected[0] not in records.REASONS
    assert good > 8000  # a good part of the damage, such as another letter in a text, leaves a good line


def test_every_usual_line_is_read_without_the_standard_library(monkeypatch):
    monkeypatch.setattr(records, "_slow_texts", None)
    source = random.Random(3)
    for _ in range(3000):
        line = json_fuzz.good_line(source)
        record = json.loads(line)
        assert parse_record(line, KEYS) == (record["text"], record["b"])
    assert parse_record(b'{"te\\u0078t": "a", "\\ud83d\\ude00": 1}', ("text",)) == ("a",)


@pytest.mark.parametrize("line", [
    b"", b"  ", b"\xef\xbb\xbf{}", b'{"text": "a"', b'{"text": "a"} x', b'{"text": "a\tb"}', b'{"text": "\\ud800"}',
    b'{"text": "\\udc00\\ud800"}', b'{"text": "\\ud800\\u0041"}', b'{"text": "\\u12g4"}', b'{"text": "\\x"}',
    b'{"text": "\xe9"}', b'{"x": "\xe9", "text": "a"}', b'{"\xe9": 1, "text": "a"}', b'{"text": "\xed\xa0\x80"}',
    b'{"x": "\xed\xa0\x80", "text": "a"}', b'{"text": 1, "text": "b"}', b'{"text": 1}', b'{"text": null}',
    b'{"x": "\\ud800", "text": "a"}', b'{"x": NaN, "text": "a"}', b'{"x": 01, "text": "a"}', b'{"x": 1., "text": "a"}',
    b'{"x": .5, "text": "a"}', b'{"x": +1, "text": "a"}', b'{"x": 1e, "text": "a"}', b'{"x": tru, "text": "a"}',
    b'{"x": [1,], "text": "a"}', b'{"x": {"a"}, "text": "a"}', b'{"x": "\\q", "text": "a"}', b'{"text": "a",}',
    b'{,"text": "a"}', b'["text"]', b'"text"', b'{"text" "a"}', b'{"text": "a", "te\\u0078t": "b"}',
    b'{"x": ' + b"[" * 200 + b"]" * 200 + b', "text": "a"}', b"[" * 100_000,
])  # fmt: skip
def test_what_is_unusual(line):
    assert outcome(parse_record, line, ("text",)) == outcome(records._slow_texts, line, ("text",))


@pytest.mark.parametrize("key", ['a"b', "a\\b", "a\tb", "\u00e9", "a b"])
def test_keys_of_any_name(key):
    assert parse_record(json.dumps({key: "x", "y": 1}).encode(), (key,)) == ("x",)
