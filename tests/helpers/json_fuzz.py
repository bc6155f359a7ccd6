"""Random lines of JSON, good ones and ones with random damage, for the parser of records."""

import json
import random
from collections.abc import Iterator
from typing import Any

CHARACTERS = 'abc xyz"\\/\n\t\r\b\f\x00\x1f\x7f{}[],:0\u00e9\u4e2d\u2028\ufeff\U0001f600\U0010ffff'
DAMAGE = b'"\\{}[],: \n\r\t\x00\x1f\xff\xc3\xed\xa0\xf0u/tfnNe-+.019Dd8'


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
