"""Real text for tests: Python sources found on this machine."""

import gzip
import json
import os
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path

SKIPPED = {"__pycache__", "site-packages", "dist-packages"}


def python_sources(limit: int, largest: int = 20_000) -> list[str]:
    """`limit` different documents of at most `largest` characters, in a fixed order: the standard library's sources,
    then, where Python comes without its tests, those of installed packages.
    """
    documents = _sources(largest)
    assert len(documents) >= limit, f"only {len(documents)} Python sources found, {limit} wanted"
    return list(documents[:limit])


@cache
def _sources(largest: int, enough: int = 1000) -> tuple[str, ...]:
    documents: dict[str, None] = {}
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for folder, names, files in os.walk(root):
            names[:] = sorted(name for name in names if name not in SKIPPED)
            for name in sorted(files):
                if name.endswith(".py") and len(documents) < enough:
                    try:
                        text = (Path(folder) / name).read_bytes().decode("utf-8")
                    except (OSError, UnicodeDecodeError):
                        continue
                    if 0 < len(text) <= largest:
                        documents[text] = None
    return tuple(documents)


def write_jsonl(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    """One record per line; gzip where the name ends in .gz."""
    content = "".join(json.dumps({key: text}) + "\n" for text in texts).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path
