"""A small corpus of real text for the quickstart: the sources of the Python library found on this machine.

    python examples/quickstart/corpus.py --output-dir DIR [--megabytes 8]

writes two folders of JSON lines, one document (one file) per line, in the layout that preprocessing reads:

    DIR/library/0.jsonl, 1.jsonl, ...            modules of the standard library
    DIR/tests_and_docs/0.jsonl, 1.jsonl, ...     its tests, demos and texts; where it has none, its help pages

The same Python and the same size give the same files. A second call with the same arguments changes nothing.
"""

import argparse
import ast
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

FOLDERS = ("library", "tests_and_docs")
FILE_BYTES = 1_000_000  # a new jsonl file begins after this many
TEST_FOLDERS = {"test", "tests", "idle_test", "idlelib", "turtledemo", "demo", "lib2to3"}
TEXT_ENDINGS = (".py", ".txt", ".rst")
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__"}
LARGEST, SMALLEST = 300_000, 200  # characters of a document: tables and empty modules teach nothing


def library_files() -> tuple[list[Path], list[Path]]:
    """The files of the standard library in a fixed order: modules, and tests with texts."""
    root = Path(sysconfig.get_path("stdlib"))
    modules: list[Path] = []
    others: list[Path] = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in LEFT_OUT)
        for name in sorted(files):
            path = Path(folder) / name
            if name.endswith(TEXT_ENDINGS):
                is_test = not name.endswith(".py") or TEST_FOLDERS.intersection(path.relative_to(root).parts[:-1])
                (others if is_test else modules).append(path)
    return modules, others


def read_documents(paths: Iterable[Path]) -> Iterator[str]:
    """The readable ones among the files, without repetitions."""
    seen: set[int] = set()
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a test of encodings, or a file that this user may not read
        if SMALLEST <= len(text) <= LARGEST and hash(text) not in seen:
            seen.add(hash(text))
            yield text


def help_documents(paths: Iterable[Path]) -> Iterator[str]:
    """A page for each module, of its docstrings: documentation that every Python carries along. Nothing is imported."""
    for path in paths:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue
        parts = [f"{path.stem}\n{'=' * len(path.stem)}"]
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                parts.append(text if isinstance(node, ast.Module) else f"{node.name}\n\n{text}")
        page = "\n\n".join(parts) + "\n"
        if SMALLEST <= len(page) <= LARGEST:
            yield page


def as_jsonl(documents: Iterable[str], limit: int) -> list[str]:
    """Documents as the text of jsonl files of about `FILE_BYTES`, `limit` bytes in all."""
    files, lines, size, total = [], [], 0, 0
    for document in documents:
        line = json.dumps({"text": document}, ensure_ascii=True) + "\n"
        if total + len(line) > limit and total:
            break
        lines.append(line)
        size += len(line)
        total += len(line)
        if size >= FILE_BYTES:
            files.append("".join(lines))
            lines, size = [], 0
    return files + ["".join(lines)] if lines else files


def spread(paths: Sequence[Path]) -> list[Path]:
    """The files in an order that mixes the alphabet, so that a small share of them is not one package alone."""
    step = 37
    return [path for start in range(step) for path in paths[start::step]]


def write_folder(folder: Path, files: Sequence[str]) -> bool:
    """Write `0.jsonl`, `1.jsonl`, ... each in one step; files of an earlier, larger corpus go. True if one changed."""
    folder.mkdir(parents=True, exist_ok=True)
    changed = False
    for index, content in enumerate(files):
        path = folder / f"{index}.jsonl"
        if path.is_file() and path.read_text(encoding="ascii") == content:
            continue
        temporary = folder / f".{index}.jsonl.tmp"
        temporary.write_text(content, encoding="ascii")
        os.replace(temporary, path)
        changed = True
    for path in folder.glob("*.jsonl"):
        if path.stem.isdigit() and int(path.stem) >= len(files):
            path.unlink()
            changed = True
    return changed


def build(output_dir: Path, megabytes: float) -> None:
    """Write the corpus and print what it holds."""
    modules, others = library_files()
    half = int(megabytes * 1e6 / 2)
    library = as_jsonl(read_documents(spread(modules)), half)
    second = as_jsonl(read_documents(spread(others)), half)
    if sum(map(len, second)) < half // 2:  # many distributions leave the tests out
        second = as_jsonl(chain(read_documents(spread(others)), help_documents(spread(modules))), half)
    if not library or not second:
        sys.exit(f"error: no Python library sources found in {sysconfig.get_path('stdlib')}")
    for name, files in zip(FOLDERS, (library, second), strict=True):
        changed = write_folder(output_dir / name, files)
        documents = sum(content.count("\n") for content in files)
        size = sum(map(len, files)) / 1e6
        state = "written" if changed else "already there"
        print(f"{output_dir / name}: {len(files)} files, {documents:,} documents, {size:.1f} MB, {state}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the quickstart's corpus from this Python's own library.")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--megabytes", type=float, default=8.0, help="size of both folders together (default: 8)")
    flags = parser.parse_args(argv)
    if flags.megabytes <= 0:
        parser.error("--megabytes must be above 0")
    build(flags.output_dir, flags.megabytes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
