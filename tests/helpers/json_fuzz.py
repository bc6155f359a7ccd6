"""Compare the native reader of JSON lines with the standard library, on random lines and on lines with random damage.

    python tests/helpers/json_fuzz.py EXTENSION COUNT

For builds with sanitizers (`native_build.run_sanitized`). Exit status 0: no difference.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.native_build import JSON, use_extension
from megatron_mixtral.data.corpus import records
from megatron_mixtral.data.corpus.records import BadRecord
from megatron_mixtral.tokenizer.engines.extensions import load_extension

CHARACTERS = 'abc xyz"\\/\n\t\r\b\f\x00\x1f\x7f{}[],:0\u00e9\u4e2d\u2028\ufeff\U0001f600\U0010ffff'
DAMAGE = b'"\\{}[],: \n\r\t\x00\x1f\xff\xc3\xed\xa0\xf0u/tfnNe-+.019Dd8'


def main(extension: str, count: str) -> int:
    use_extension(JSON, Path(extension))
    lines = [line for _, line in zip(range(int(count)), random_lines(7), strict=False)]
    accepted, difference = compare(lines)
    sys.stdout.write(f"{accepted} of {len(lines)} lines accepted, first difference: {difference!r}\n")
    return int(difference is not None)


def compare(lines: list[bytes]) -> tuple[int, bytes | None]:
    """(lines that the native reader accepts, the first of them of which the standard library has other texts)."""
    keys = ("text", "b")
    reader = load_extension(JSON).LineReader(keys)
    accepted = 0
    for line in lines:
        columns, read, stop = reader.read(line, 0, len(line), 1 << 20)
        if not read:
            assert stop == 0 and columns == ([], [])
            continue
        accepted += read
        ends = [part for part in line[:stop].split(b"\n") if part]
        try:
            expected = [records._slow_texts(part, keys) for part in ends]
        except BadRecord:
            return accepted, line
        if [list(row) for row in zip(*columns, strict=True)] != expected:
            return accepted, line
    return accepted, None


def random_lines(seed: int) -> Iterator[bytes]:
    """Lines with the keys "text" and "b", three of four with a few bytes changed, left out or put in."""
    source = random.Random(seed)
    while True:
        line = bytearray(good_line(source))
        for _ in range(source.choice([0, 1, 1, 3])):
            at = source.randrange(len(line))
            what = source.randrange(4)
            if what == 0:
                line[at] = source.choice(DAMAGE)
            elif what == 1:
                line.insert(at, source.choice(DAMAGE))
            elif what == 2:
                del line[at]
            else:
                del line[at:]
            line = line or bytearray(b" ")
        yield bytes(line)


def good_line(source: random.Random) -> bytes:
    """A line that holds what JSON can hold."""
    record = {name: random_value(source, 0) for name in source.sample(["id", "meta", "\u00e9", "tex", "c\\td"], 2)}
    record |= {"text": random_text(source), "b": random_text(source)}
    names = source.sample(sorted(record), len(record))
    separators = source.choice([(",", ":"), (", ", ": "), (" ,\t", "  :\r")])
    text = json.dumps({name: record[name] for name in names}, ensure_ascii=source.random() < 0.5, separators=separators)
    return (source.choice(["", " "]) + text + source.choice(["", "\n", "\r\n", " "])).encode()


def random_text(source: random.Random) -> str:
    return "".join(source.choices(CHARACTERS, k=source.choice([0, 1, 5, 8, 9, 40])))


def random_value(source: random.Random, depth: int) -> Any:
    simple = [None, True, False, 0, -1, 12.5, 1e-300, 10**30, -0.0, random_text(source)]
    if depth > 3 or source.random() < 0.6:
        return source.choice(simple)
    if source.random() < 0.5:
        return [random_value(source, depth + 1) for _ in range(source.randrange(4))]
    return {random_text(source): random_value(source, depth + 1) for _ in range(source.randrange(4))}


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
