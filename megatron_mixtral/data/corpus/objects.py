"""JSON objects with their places, for instruction data: lines of JSON, elements of one JSON array, or rows of Parquet.

Instruction sets are often published as a single `.json` array; it is read in blocks, so memory is bounded by the
largest record.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from megatron_mixtral.data.corpus.files import PARQUET, InputFile, cut_chunks
from megatron_mixtral.data.corpus.readers import ROWS, LineCounts, check_packed, read_lines, read_text
from megatron_mixtral.errors import DataError

_MARK = re.compile(r"[ \t\r\n]*([\[,\]])[ \t\r\n]*")


def read_objects(file: InputFile, chunk_bytes: int, counts: LineCounts) -> Iterator[tuple[str, Any]]:
    """(place, record) of each record: a line as bytes, or an array's element or a row as it is. Lines are counted.

    Raises `DataError` where the file cannot be read on.
    """
    check_packed(file)
    if file.format == PARQUET or is_array(file):
        for number, record in enumerate(_rows(file) if file.format == PARQUET else read_array(file), start=1):
            yield f"{file.path}, record {number}", record
        return
    here = LineCounts()
    for chunk in cut_chunks([file], chunk_bytes):
        for line in read_lines(chunk, here):
            yield f"{file.path}:{here.lines}", line
    counts.add(here)


def is_array(file: InputFile) -> bool:
    """Whether the first character of a file that is not white space opens an array."""
    try:
        return next((text for text in read_text(file) if text), "").lstrip().startswith("[")
    except UnicodeDecodeError:
        return False  # read as lines, where the error is told with its place


def read_array(file: InputFile) -> Iterator[Any]:
    """The elements of the array. `DataError` for text that is no JSON array, which cannot be read past the error."""
    number = 0
    try:
        for element in _elements(read_text(file)):
            number += 1
            yield element
    except (ValueError, RecursionError) as error:
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


def _elements(blocks: Iterator[str]) -> Iterator[Any]:
    """Raises ValueError where the text is no array."""
    decode = json.JSONDecoder().raw_decode
    text, position, allowed = "", 0, "["

    def grow() -> bool:
        """Read on; at least as much as is held, so that a huge record is not parsed over and over."""
        nonlocal text, position
        pieces = [text[position:]]
        left = len(pieces[0])
        while left >= 0 and (block := next(blocks, None)) is not None:
            pieces.append(block)
            left -= len(block)
        text, position = "".join(pieces), 0
        return len(pieces) > 1

    while True:
        mark = _MARK.match(text, position)
        if (mark is None or mark.end() == len(text)) and grow():
            continue
        if mark is None or mark[1] not in allowed:
            raise ValueError(f"expected one of {' '.join(allowed)} before {text[position : position + 40]!r}")
        if mark[1] == "]":
            if text[mark.end() :] or any(blocks):
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
