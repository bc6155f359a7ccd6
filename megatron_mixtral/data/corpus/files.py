"""Input files: which there are, in which order, and how they are cut into the pieces that workers take.

Formats: JSON lines, plain (`.jsonl`, `.json`), gzip (`.gz`) or Zstandard (`.zst`), and Parquet (`.parquet`).

Order: the inputs as given; inside a folder or a glob, natural order of the path (`2.jsonl` before `10.jsonl`); inside a
file, the order of its lines or rows. A plain file is cut into byte ranges that need not begin at a line: a range owns
the lines whose first byte lies in it, so every line has exactly one owner and no pass over the file is needed to cut
it. A Parquet file is cut at its row groups; a compressed file is one piece. Where the cuts lie depends on the inputs
alone, not on the number of workers, so that a run can be taken up again with more or fewer of them.
"""

import glob
import hashlib
import importlib.util
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mixtral.data.report import REPORT_SUFFIX
from megatron_mixtral.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
PLAIN, GZIP, ZSTD, PARQUET = "plain", "gzip", "zstd", "parquet"
FORMAT_OF_ENDING = {".gz": GZIP, ".zst": ZSTD, ".parquet": PARQUET}
OTHER_ENDINGS = (".bz2", ".xz", ".zip", ".tar", ".tgz", ".csv", ".arrow")
MAGIC = {b"\x1f\x8b": GZIP, b"\x28\xb5\x2f\xfd": ZSTD, b"PK": "zip", b"PAR1": PARQUET, b"BZ": "bzip2"}
PACKAGES = {ZSTD: "zstandard", PARQUET: "pyarrow"}
SMALLEST_CHUNK = 1 << 16
CHUNKS_OF_SMALL_INPUTS = 64


@dataclass(frozen=True)
class InputFile:
    """One input file: its path, its size in bytes and its time (ns) when it was listed, and its format."""

    path: str
    size: int
    mtime_ns: int
    format: str

    @property
    def is_plain(self) -> bool:
        """Whether it is cut at bytes, which are all accounted for."""
        return self.format == PLAIN


@dataclass(frozen=True)
class InputFiles:
    """All input files in reading order, and the files of folders that are left out because of their name."""

    files: tuple[InputFile, ...]
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class Chunk:
    """A piece of a file: bytes [start, end) of a plain file, row groups [start, end) of a Parquet file, or all of it.

    `size` is the number of bytes of the file that it stands for.
    """

    file: InputFile
    file_index: int
    start: int
    end: int
    size: int

    @property
    def name(self) -> str:
        """What the chunk's parts are called: the same for the same piece of the same, unchanged file."""
        file = self.file
        identity = "\0".join(map(str, (os.path.abspath(file.path), file.size, file.mtime_ns, self.start, self.end)))
        return "part-" + hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:20]


def natural_key(path: str) -> list[tuple[tuple[int, int, str], ...]]:
    """Sort key under which numbers inside names count as numbers: `a2` < `a10`. Ties end by the plain name."""
    return [
        tuple((0, int(piece), piece) if piece.isascii() and piece.isdigit() else (1, 0, piece) for piece in pieces)
        for pieces in ([p for p in re.split(r"([0-9]+)", part) if p] for part in Path(path).parts)
    ]


def list_inputs(inputs: Sequence[str]) -> InputFiles:
    """The files behind `--input`: files, folders (searched recursively) and glob patterns, each in natural order.

    Inside folders only names that end in one of `SUFFIXES` are taken; hidden files and reports of earlier runs are left
    out, all other names are returned in `ignored`. A file named directly may have any name; its ending decides how it
    is read.

    Raises:
        ConfigError: nothing given, nothing found, a path that does not exist, one file given twice, or a format whose
            package is not installed.
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
    if ignored:
        logger.warning("%d files are not read because of their names: %s ...", len(ignored), ", ".join(ignored[:3]))
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
    """Size, time and format of one file; refuses early what would fail late."""
    if not os.path.isfile(path):
        raise DataError(f"{path} is not a regular file. Pipes cannot be read in pieces: write a file first.")
    if path.endswith(OTHER_ENDINGS):
        raise DataError(f"{path}: this format is not read. Convert it to one of: {', '.join(SUFFIXES)}.")
    kind = FORMAT_OF_ENDING.get(os.path.splitext(path)[1], PLAIN)
    try:
        status = os.stat(path)
        with open(path, "rb") as stream:
            begin = stream.read(4)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    held = next((name for magic, name in MAGIC.items() if begin.startswith(magic)), PLAIN)
    if kind == PLAIN and held != PLAIN:
        raise DataError(f"{path} holds {held} data, not JSON lines. Its name must say so: .gz, .zst, .parquet.")
    if kind != held:
        raise DataError(f"{path} is named as a {kind} file but is not one.")
    package = PACKAGES.get(kind)
    if package and importlib.util.find_spec(package) is None:
        raise ConfigError(f"{path}: to read {kind} files, install the package {package}: pip install {package}.")
    return InputFile(path, status.st_size, status.st_mtime_ns, kind)


def cut_chunks(files: Sequence[InputFile], most: int, shard: int = 0, shards: int = 1) -> list[Chunk]:
    """The pieces of all files, in order: byte ranges of `most` bytes, row groups, whole compressed files; of these,
    those of one shard.

    Inputs of less than `CHUNKS_OF_SMALL_INPUTS` such ranges are cut finer, so that every worker gets something. An
    empty file gives no chunk. Raises `ConfigError` for a shard that gets none.
    """
    total = sum(file.size for file in files)
    step = max(min(most, total // CHUNKS_OF_SMALL_INPUTS), min(most, SMALLEST_CHUNK))
    chunks: list[Chunk] = []
    for file_index, file in enumerate(files):
        if file.format == PARQUET:
            groups = _row_groups(file)
            ranges = [(number, number + 1, file.size // groups) for number in range(groups)]
        elif file.format == PLAIN:
            starts = range(0, file.size, step)
            ranges = [(start, min(start + step, file.size), min(step, file.size - start)) for start in starts]
        else:
            ranges = [(0, file.size, file.size)]
        chunks += [Chunk(file, file_index, *piece) for piece in ranges]
    return chunks if shards == 1 else _shard(chunks, shard, shards)


def _row_groups(file: InputFile) -> int:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file.path) as parquet:
            return parquet.num_row_groups
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.path}: damaged Parquet file: {error}") from error


def _shard(chunks: Sequence[Chunk], index: int, count: int) -> list[Chunk]:
    """The chunks of shard `index` of `count`: consecutive ones, about the same number of bytes for each shard.

    A chunk belongs to the shard in whose share of all bytes its middle lies. So the shards, one after another, are all
    chunks in order.
    """
    total = max(sum(chunk.size for chunk in chunks), 1)
    taken, before = [], 0
    for chunk in chunks:
        if (2 * before + chunk.size) * count // (2 * total) == index:
            taken.append(chunk)
        before += chunk.size
    if not taken:
        raise ConfigError(
            f"--shard-index {index} of --num-shards {count} gets nothing: the input has only {len(chunks)} pieces "
            f"(a compressed file is one). Use fewer shards."
        )
    return taken
