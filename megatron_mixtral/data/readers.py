"""Input files to records: which files, in which order, in which pieces, and what becomes of each line.

Formats: JSON lines, plain (`.jsonl`, `.json`) or gzip (`.jsonl.gz`, `.json.gz`). One record is one line that ends at
`\\n` and at nothing else: U+2028, U+0085, form feeds and lone `\\r` occur inside text.

Order: the inputs as given; inside a folder or a glob, natural order of the path (`2.jsonl` before `10.jsonl`); inside a
file, the order of its lines. A plain file is cut into byte ranges that need not begin at a line: a range owns the lines
whose first byte lies in it, so every line has exactly one owner and no pass over the file is needed to cut it.
"""

import glob
import gzip
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_mixtral.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
REPORT_SUFFIX = ".report.json"  # what preprocessing writes beside its output; never an input
UTF8_BOM = b"\xef\xbb\xbf"
OTHER_FORMATS = (".zst", ".parquet", ".bz2", ".xz", ".zip", ".tar", ".tgz", ".csv", ".arrow")
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd", b"PK": "zip", b"PA": "parquet", b"BZ": "bzip2"}


class BadRecord(Exception):
    """A line that gives no document. `reason` is one of `REASONS`; the text says what is wrong and shows a piece."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        assert reason in REASONS, reason
        self.reason = reason


REASONS = ("bad_utf8", "bad_json", "not_an_object", "missing_key", "not_a_string", "lone_surrogate")


@dataclass(frozen=True)
class InputFile:
    """One input file: its path, its size in bytes when it was listed, and whether it is compressed."""

    path: str
    size: int
    gzipped: bool


@dataclass(frozen=True)
class InputFiles:
    """All input files in reading order, and the files of folders that are left out because of their name."""

    files: tuple[InputFile, ...]
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class Chunk:
    """Bytes [start, end) of a plain file, or a whole gzip file. `index` counts all chunks of a run, in order."""

    index: int
    file: InputFile
    file_index: int
    start: int
    end: int


@dataclass
class LineCounts:
    """What was met while reading: lines, blank lines, bytes of lines, and whether the file began with a BOM."""

    lines: int = 0
    blank: int = 0
    bytes: int = 0
    boms: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


def natural_key(path: str) -> list[tuple[tuple[int, int, str], ...]]:
    """Sort key under which numbers inside names count as numbers: `a2` < `a10`. Ties end by the plain name."""
    return [
        tuple((0, int(piece), piece) if piece.isascii() and piece.isdigit() else (1, 0, piece) for piece in pieces)
        for pieces in ([p for p in re.split(r"([0-9]+)", part) if p] for part in Path(path).parts)
    ]


def list_inputs(inputs: Sequence[str]) -> InputFiles:
    """The files behind `--input`: files, folders (searched recursively) and glob patterns, each in natural order.

    Inside folders only names that end in one of `SUFFIXES` are taken; hidden files and reports of earlier runs are left
    out, all other names are returned in `ignored`. A file named directly may have any name and is read as JSON lines.

    Raises:
        ConfigError: nothing given, nothing found, a path that does not exist, or one file given twice.
        DataError: a format that is not read, or something that is not a regular file.
    """
    if not inputs:
        raise ConfigError("--input names no file, folder or pattern.")
    paths: list[str] = []
    ignored: list[str] = []
    for given in inputs:
        if os.path.isdir(given):
            found, left_out = _list_folder(given)
            ignored += left_out
            if not found:
                raise ConfigError(f"--input {given}: no file of this folder ends in {', '.join(SUFFIXES)}.")
            paths += found
        elif os.path.exists(given):
            paths.append(given)
        elif glob.has_magic(given):
            found = [path for path in glob.glob(given, recursive=True) if not os.path.isdir(path)]
            if not found:
                raise ConfigError(f"--input {given}: no file matches this pattern.")
            paths += sorted(found, key=natural_key)
        else:
            raise ConfigError(f"--input {given} does not exist.")
    seen: dict[str, str] = {}
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise ConfigError(f"--input names {path} twice (as {seen[real]} too). To weight data, use the blend.")
        seen[real] = path
    return InputFiles(tuple(_inspect(path) for path in paths), tuple(ignored))


def _list_folder(folder: str) -> tuple[list[str], list[str]]:
    found: list[str] = []
    ignored: list[str] = []
    visited: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:  # a link back to a parent folder
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            taken = name.endswith(SUFFIXES) and not name.endswith(REPORT_SUFFIX) and not name.startswith(".")
            (found if taken else ignored).append(os.path.join(root, name))
    return sorted(found, key=natural_key), sorted(ignored, key=natural_key)


def _inspect(path: str) -> InputFile:
    """Size and compression of one file; refuses early what would fail late."""
    if not os.path.isfile(path):
        raise DataError(f"{path} is not a regular file. Pipes cannot be read in pieces: write a file first.")
    if path.endswith(OTHER_FORMATS):
        raise DataError(f"{path}: this format is not read. Convert it to one of: {', '.join(SUFFIXES)}.")
    gzipped = path.endswith(".gz")
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as stream:
            magic = MAGIC.get(stream.read(2))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    if magic and not (gzipped and magic == "gzip"):
        raise DataError(f"{path} holds {magic} data, not JSON lines. Name gzip files .gz; unpack other kinds.")
    if gzipped and magic != "gzip":
        raise DataError(f"{path} ends in .gz but is not a gzip file.")
    return InputFile(path, size, gzipped)


def cut_chunks(files: Sequence[InputFile], chunk_bytes: int) -> list[Chunk]:
    """Byte ranges of about `chunk_bytes` over all files, in order; a gzip file is one chunk, an empty file none."""
    chunks: list[Chunk] = []
    for file_index, file in enumerate(files):
        step = file.size if file.gzipped else chunk_bytes
        for start in range(0, file.size, max(step, 1)):
            chunks.append(Chunk(len(chunks), file, file_index, start, min(start + step, file.size)))
    return chunks


def read_lines(chunk: Chunk, counts: LineCounts) -> Iterator[bytes]:
    """The lines that a chunk owns, without blank ones and without the BOM of the file; `counts` sees every line.

    The chunk's k-th line is being handled while `counts.lines == k`.

    Raises:
        DataError: the file cannot be read, or its gzip stream is damaged.
    """
    try:
        for line in _raw_lines(chunk):
            counts.lines += 1
            counts.bytes += len(line)
            if counts.lines == 1 and chunk.start == 0 and line.startswith(UTF8_BOM):
                counts.boms += 1
                line = line[len(UTF8_BOM) :]
            if line.strip(b" \t\r\n"):
                yield line
            else:
                counts.blank += 1
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{chunk.file.path}: damaged gzip data after line {counts.lines}: {error}.") from error
    except OSError as error:
        raise DataError(f"{chunk.file.path} cannot be read: {error}.") from error


def _raw_lines(chunk: Chunk) -> Iterator[bytes]:
    if chunk.file.gzipped:
        with gzip.open(chunk.file.path, "rb") as stream:
            yield from stream
        return
    with open(chunk.file.path, "rb", buffering=1 << 20) as stream:
        position = chunk.start
        if position:
            # The line under way belongs to an earlier chunk. The search stops at the end of this chunk, so a line of a
            # gigabyte is passed over once, not once per chunk.
            stream.seek(position - 1)
            passed = stream.readline(chunk.end - position + 1)
            if not passed.endswith(b"\n"):
                return
            position += len(passed) - 1
        while position < chunk.end and (line := stream.readline()):
            position += len(line)
            yield line


def parse_record(line: bytes, keys: Sequence[str]) -> list[str]:
    """The texts of `keys` in one line of JSON.

    Raises `BadRecord` for bytes that are not UTF-8, bad JSON, a value that is no object, a missing key, a text that is
    not a string, and a string with half of a surrogate pair (which has no UTF-8 form). NaN, NUL (`\\u0000`) and unknown
    keys are fine; of a key that occurs twice the last counts.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        piece = line[max(error.start - 20, 0) : error.start + 20]
        raise BadRecord("bad_utf8", f"byte {error.start + 1} of the line is not UTF-8, near {piece!r}") from error
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRecord("bad_json", f"{error.msg} at column {error.pos + 1}, near {_piece(text, error.pos)}") from error
    except (ValueError, RecursionError) as error:
        raise BadRecord("bad_json", f"{error}, in {_piece(text, 0)}") from error
    if not isinstance(record, dict):
        hint = " (a JSON array of records: write one record per line)" if isinstance(record, list) else ""
        raise BadRecord("not_an_object", f"expected an object, found {_kind(record)}{hint}: {_piece(text, 0)}")
    texts = []
    for key in keys:
        if key not in record:
            found = ", ".join(list(record)[:8]) or "none"
            raise BadRecord("missing_key", f"no key {key!r}; keys found: {found} (choose with --json-keys)")
        value = record[key]
        if not isinstance(value, str):
            raise BadRecord("not_a_string", f"the value of {key!r} is {_kind(value)}, not a string: {_piece(text, 0)}")
        # Half a pair can only come from an escape, since the bytes were UTF-8; most documents need no second look.
        if "\\u" in text and (half := re.search("[\ud800-\udfff]", value)):
            shown = ascii(value[max(half.start() - 20, 0) : half.start() + 20])
            raise BadRecord("lone_surrogate", f"half of a surrogate pair in the value of {key!r}, near {shown}")
        texts.append(value)
    return texts


def _piece(text: str, position: int) -> str:
    start = max(position - 30, 0)
    return ascii(text[start : start + 60].rstrip("\r\n"))


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
