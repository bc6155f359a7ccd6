"""Records of instruction data with their places: lines of JSON, elements of one JSON array, or rows of Parquet.

Instruction sets are often published as a single `.json` array; it is read in blocks, so memory is bounded by the
largest record. `data/instruction/run.py` reads these.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from megatron_mixtral.data.corpus.files import GZIP, PARQUET, ZSTD, InputFile, cut_chunks
from megatron_mixtral.data.corpus.readers import LineCounts, read_lines
from megatron_mixtral.errors import DataError

BLOCK = 1 << 20  # characters
ROWS = 256
_MARK = re.compile(r"[ \t\r\n]*([\[,\]])[ \t\r\n]*")


@dataclass
class Lines:
    """Lines of JSON lines that were read, and how many of them were blank."""

    read: int = 0
    blank: int = 0


def read_file(file: InputFile, chunk_bytes: int, lines: Lines) -> Iterator[tuple[str, Any]]:
    """(place, record) of each record: a line as bytes, or an array's element or a row as it is. `lines` adds up.

    Raises `DataError` where the file cannot be read on.
    """
    if file.format == PARQUET or is_array(file):
        for number, record in enumerate(_rows(file) if file.format == PARQUET else read_array(file), start=1):
            yield f"{file.path}, record {number}", record
        return
    before = 0
    for chunk in cut_chunks([file], chunk_bytes):
        here = LineCounts()
        for line in read_lines(chunk, here):
            yield f"{file.path}:{before + here.lines}", line
        before += here.lines
        lines.read, lines.blank = lines.read + here.lines, lines.blank + here.blank


def is_array(file: InputFile) -> bool:
    """Whether the first character of a file that is not white space opens an array."""
    try:
        with _open(file) as stream:
            return stream.read(4096).lstrip().startswith("[")
    except (UnicodeDecodeError, EOFError, zlib.error, OSError):
        return False  # read as lines, where the error is told with its place


def read_array(file: InputFile) -> Iterator[Any]:
    """The elements of the array. `DataError` for text that is no JSON array, which cannot be read past the error."""
    number = 0
    try:
        with _open(file) as stream:
            for element in _elements(stream):
                number += 1
                yield element
    except (ValueError, RecursionError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{file.path}: the JSON array cannot be read after record {number}: {error}.") from error


def _rows(file: InputFile) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file.path) as parquet:
            for batch in parquet.iter_batches(ROWS, use_threads=False):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.path}: damaged Parquet data: {error}") from error


def _open(file: InputFile) -> TextIO:
    if file.format == ZSTD:
        import zstandard

        stream = zstandard.open(file.path, "rb")
    else:
        stream = (gzip.open if file.format == GZIP else open)(file.path, "rb")
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n")


def _elements(stream: TextIO) -> Iterator[Any]:
    """Raises ValueError where the text is no array."""
    decode = json.JSONDecoder().raw_decode
    text, position, allowed = "", 0, "["

    def grow() -> bool:
        """Read on; at least as much as is held, so that a huge record is not parsed over and over."""
        nonlocal text, position
        more = stream.read(max(BLOCK, len(text) - position))
        text, position = text[position:] + more, 0
        return bool(more)

    while True:
        mark = _MARK.match(text, position)
        if (mark is None or mark.end() == len(text)) and grow():
            continue
        if mark is None or mark[1] not in allowed:
            raise ValueError(f"expected one of {' '.join(allowed)} before {text[position : position + 40]!r}")
        if mark[1] == "]":
            if text[mark.end() :] or stream.read(1):
                raise ValueError(f"text after the end of the array: {text[mark.end() :][:40]!r}")
            return
        if allowed == "[" and text.startswith("]", mark.end()):
            position, allowed = mark.end(), "]"
            continue
        try:
            value, position = decode(text, mark.end())
        except json.JSONDecodeError:
            if grow():
                continue
            raise
        allowed = ",]"
        yield value
