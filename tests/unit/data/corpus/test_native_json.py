"""The native reader of JSON lines gives the texts of the standard library, or declines."""

import itertools
import json
import random

import pytest
from helpers import json_fuzz
from helpers.native_build import JSON, SANITIZERS, compile_extension, ensure_extension, run_sanitized

from megatron_mixtral.data.corpus import records
from megatron_mixtral.tokenizer.engines.extensions import load_extension


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    ensure_extension(JSON, tmp_path_factory.mktemp("native"))
    return load_extension(JSON)


def read(module, data, keys=("text",), most=1 << 20):
    return module.LineReader(keys).read(data, 0, len(data), most)


def test_random_and_damaged_lines(module):
    lines = list(itertools.islice(json_fuzz.random_lines(seed=1), 30_000))
    accepted, difference = json_fuzz.compare(lines)
    assert difference is None
    assert accepted > 8000  # a good part of the damage, such as another letter in a text, leaves a good line


def test_every_usual_line_is_accepted(module):
    source = random.Random(3)
    for _ in range(3000):
        line = json_fuzz.good_line(source)
        columns, lines, stop = read(module, line, ("text", "b"))
        assert lines == 1 and stop == len(line), line
        record = json.loads(line)
        assert columns == ([record["text"]], [record["b"]])
    assert read(module, b'{"te\\u0078t": "a", "\\ud83d\\ude00": 1}') == ((["a"],), 1, 37)


@pytest.mark.parametrize("line", [
    b"", b"  ", b"\xef\xbb\xbf{}", b'{"text": "a"', b'{"text": "a"} x', b'{"text": "a\tb"}', b'{"text": "\\ud800"}',
    b'{"text": "\\udc00\\ud800"}', b'{"text": "\\ud800\\u0041"}', b'{"text": "\\u12g4"}', b'{"text": "\\x"}',
    b'{"text": "\xe9"}', b'{"x": "\xe9", "text": "a"}', b'{"\xe9": 1, "text": "a"}', b'{"text": "\xed\xa0\x80"}',
    b'{"text": "a", "text": "b"}', b'{"text": 1}', b'{"text": null}', b'{"a": "text"}',
    b'{"x": NaN, "text": "a"}', b'{"x": 01, "text": "a"}', b'{"x": 1., "text": "a"}', b'{"x": .5, "text": "a"}',
    b'{"x": +1, "text": "a"}', b'{"x": 1e, "text": "a"}', b'{"x": tru, "text": "a"}', b'{"x": [1,], "text": "a"}',
    b'{"x": {"a"}, "text": "a"}', b'{"text": "a",}', b'{,"text": "a"}', b'["text"]', b'"text"', b'{"text" "a"}',
    b'{"x": ' + b"[" * 200 + b"]" * 200 + b', "text": "a"}',
])  # fmt: skip
def test_what_is_wrong_or_unusual_is_declined(module, line):
    assert read(module, line) == (([],), 0, 0)


def test_many_lines_stop_at_a_bound_and_at_a_line_that_is_declined(module):
    data = b'{"text": "a"}\n' * 5 + b'{"text": 1}\n{"text": "b"}'
    assert read(module, data) == ((["a"] * 5,), 5, 70)
    assert read(module, data, most=15) == ((["a"] * 2,), 2, 28)
    reader = module.LineReader(("text",))
    assert reader.read(data, 82, len(data), 99) == ((["b"],), 1, len(data))
    assert reader.read(data, 14, 28, 99) == ((["a"],), 1, 28)
    with pytest.raises(ValueError, match="start <= end"):
        reader.read(data, 5, 4, 99)


def test_a_long_line_is_left_to_the_other_parsers(module):
    long = b'{"text": "' + b"a" * (1 << 24) + b'"}'
    assert read(module, long) == (([],), 0, 0)
    assert records.parse_record(long, ["text"]) == ["a" * (1 << 24)]


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    library = compile_extension(JSON, tmp_path, *SANITIZERS)
    done = run_sanitized(json_fuzz.__file__, library, 200_000)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert done.stdout.endswith("first difference: None\n")
