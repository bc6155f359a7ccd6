"""Documents of many kinds: what lies on every machine with Python and this project, and random Unicode strings."""

import gettext
import gzip
import json
import os
import random
import sysconfig
from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path

from megatron_mixtral.tokenizer import Tokenizer
from megatron_mixtral.tokenizer.engines import Engine, SpecialTokens

TEXT_SUFFIXES = (".pyi", ".md", ".rst", ".txt", ".json", ".h", ".cpp", ".cuh", ".html", ".toml", ".gz", ".mo", ".pyc")


def real_documents(limit: int, longest: int) -> list[str]:
    """`limit` different documents, cut at `longest` characters: Python sources and files of other kinds in turns.

    The other kinds are headers, documentation, JSON, manual pages where there are some, catalogs of translations (as
    text in dozens of languages and scripts, and as the binary files that they are) and compiled Python.
    """
    documents: dict[str, None] = {}
    roots = [Path(__file__).resolve().parents[2], *map(Path, _paths())]
    python, others = (_texts(roots, suffixes) for suffixes in ((".py",), TEXT_SUFFIXES))
    pairs = zip_longest(python, others)
    for text in (text for pair in pairs for text in pair if text):
        documents[text[:longest]] = None
        if len(documents) == limit:
            return list(documents)
    raise AssertionError(f"only {len(documents)} documents found, {limit} wanted")


def _paths() -> list[str]:
    return [sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), "/usr/share/man", "/usr/share/doc"]


def _texts(roots: Sequence[Path], suffixes: tuple[str, ...]) -> Iterator[str]:
    for root in roots:
        for folder, names, files in os.walk(root):
            names[:] = sorted(name for name in names if not name.startswith("."))
            for name in sorted(files):
                if name.endswith(suffixes):
                    yield from _read(Path(folder) / name)


def _read(path: Path) -> Iterator[str]:
    try:
        content = path.read_bytes()[:2_000_000]
        if path.suffix == ".gz":
            content = gzip.decompress(path.read_bytes())
        if path.suffix == ".mo":
            with open(path, "rb") as file:
                yield "\n".join(map(str, gettext.GNUTranslations(file)._catalog.values()))
    except (OSError, EOFError, UnicodeDecodeError):
        return
    yield content.decode("latin-1") if path.suffix == ".pyc" else content.decode("utf-8", errors="replace")


def random_texts(count: int, tokenizer: Tokenizer, seed: int = 1) -> Iterator[str]:
    """Random Unicode strings: characters of all planes, pieces of the vocabulary in random order, runs, white space."""
    draw = random.Random(seed)
    vocabulary = [text for text in (tokenizer.decode([i]) for i in range(min(tokenizer.vocab_size, 40_000))) if text]
    letters = "abcdefghijklmnopqrstuvwxyz"
    kinds = [
        lambda: "".join(_character(draw) for _ in range(draw.randrange(40))),
        lambda: "".join(draw.choice((" ", "", "")) + draw.choice(vocabulary) for _ in range(draw.randrange(15))),
        lambda: "".join(draw.choice((_character(draw), draw.choice(vocabulary))) for _ in range(draw.randrange(20))),
        lambda: _character(draw) * draw.randrange(100) + draw.choice(vocabulary) * draw.randrange(30),
        lambda: "".join(draw.choices(letters, k=draw.randrange(100))),
        lambda: "".join(draw.choices(" \n ab\u2581\t", k=draw.randrange(150))),
    ]
    for _ in range(count):
        yield draw.choice(kinds)()


def _character(draw: random.Random) -> str:
    ranges = ((0x20, 0x7E), (0x20, 0x7E), (0x00, 0xFF), (0x80, 0x7FF), (0x2580, 0x2582), (0x4E00, 0x9FFF),
              (0x0800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF))  # fmt: skip
    return chr(draw.randint(*draw.choice(ranges)))


def first_difference(engine: Engine, tokenizer: Tokenizer, texts: Iterator[str] | Sequence[str]) -> str | None:
    """The first text for which the engine does not give the ids of the tokenizer, with both; None if there is none."""
    texts = iter(texts)
    while batch := list(islice(texts, 500)):
        ids, lengths = engine.encode(batch, SpecialTokens(None, None))
        assert len(lengths) == len(batch) and lengths.sum() == len(ids)
        start = 0
        for text, length in zip(batch, lengths.tolist(), strict=True):
            found, start = ids[start : start + length].tolist(), start + length
            expected = tokenizer.encode(text)
            if found != expected:
                return json.dumps([text, found, expected])
    return None
