"""A chunk of input to records: the texts of each line or row, or the reason why it has none.

One record is one line that ends at `\\n` and at nothing else: U+2028, U+0085, form feeds and lone `\\r` occur inside
text. Nothing is read twice but the end of a line that is longer than a chunk, and memory is bounded by a chunk and the
longest line.
"""

import codecs
import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_mixtral.data.corpus.files import GZIP, PARQUET, PLAIN, ZSTD, Chunk, InputFile
from megatron_mixtral.data.corpus.records import BadRecord, parse_record
from megatron_mixtral.errors import DataError

UTF8_BOM = b"\xef\xbb\xbf"
BLOCK = 1 << 20
COMPRESSED_BLOCK = 1 << 16  # small, because what comes out of it may be a thousand times as large
ROWS = 256

Block = tuple[bytes, int, int]
Columns = tuple[Sequence[str], ...]  # of some lines: their texts, a sequence for each key


@dataclass
class LineCounts:
    """What was met while reading: lines (or rows), blank lines, bytes of lines, and whether the file began with a BOM.

    `begin` and `end` are the positions in a plain file between which the lines lie, equal where a chunk owns none.
    Those of neighbouring chunks must meet, which shows that no byte was passed over.
    """

    lines: int = 0
    blank: int = 0
    bytes: int = 0
    boms: int = 0
    begin: int = 0
    end: int = 0

    def add(self, other: "LineCounts") -> None:
        """Take in the counts of another piece, but for its place."""
        for name in ("lines", "blank", "bytes", "boms"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def read_records(chunk: Chunk, keys: tuple[str, ...], counts: LineCounts) -> Iterator[Columns | BadRecord]:
    """The texts of `keys` of the lines or rows that a chunk owns, some at a time, and each one that has none.

    When a `BadRecord` is given, its line is `counts.lines`.

    Raises:
        DataError: the file cannot be read, or its compressed data are damaged, or a Parquet file has no such column.
    """
    if chunk.file.format == PARQUET:
        yield from _read_rows(chunk, keys, counts)
        return
    checked = False
    for data, at, end in read_blocks(chunk, counts):
        rows: list[tuple[str, ...]] = []
        held = 0
        while at < end:
            line, at = _line_at(data, at, end)
            counts.lines += 1
            found: tuple[str, ...] | BadRecord | None = _parsed(line, keys, counts)
            if isinstance(found, tuple):
                rows.append(found)
                held += len(line)
            if rows and (held >= BLOCK or at == end or isinstance(found, BadRecord)):
                yield tuple(zip(*rows, strict=True))
                rows, held = [], 0
            if isinstance(found, BadRecord):
                if not checked:
                    check_packed(chunk.file)
                    checked = True
                yield found


def _parsed(line: bytes, keys: tuple[str, ...], counts: LineCounts) -> tuple[str, ...] | BadRecord | None:
    """The texts of a line, or why it has none; None for a blank one, which is counted."""
    try:
        return parse_record(line, keys)
    except BadRecord as error:
        if not _is_blank(line):
            return error
        counts.blank += 1
        return None


def read_lines(chunk: Chunk, counts: LineCounts) -> Iterator[bytes]:
    """The lines that a chunk owns, without `\\n`, without blank ones and without the BOM of the file."""
    for data, at, end in read_blocks(chunk, counts):
        while at < end:
            line, at = _line_at(data, at, end)
            counts.lines += 1
            if _is_blank(line):
                counts.blank += 1
            else:
                yield line


def _line_at(data: bytes, at: int, end: int) -> tuple[bytes, int]:
    """The line that begins at `at`, and where the next one does. `data` itself where it is all of it."""
    newline = data.find(b"\n", at, end)
    return (data[at:end], end) if newline < 0 else (data[at:newline], newline + 1)


def _is_blank(line: bytes) -> bool:
    return not line.strip(b" \t\r")


def read_blocks(chunk: Chunk, counts: LineCounts) -> Iterator[Block]:
    """The lines that a chunk owns, many at a time: (data, start, end), whole lines and only the file's last without
    `\\n`; without the BOM of the file.

    Raises `DataError` when the file cannot be read, or is packed and damaged.
    """
    first_of_file = chunk.start == 0
    try:
        blocks = _plain_blocks if chunk.file.format == PLAIN else _unpacked_blocks
        for data, start, end in blocks(chunk, counts):
            if first_of_file and data.startswith(UTF8_BOM, start):
                counts.boms += 1
                start += len(UTF8_BOM)
            first_of_file = False
            yield data, start, end
    except OSError as error:
        raise DataError(f"{chunk.file.path} cannot be read: {error}.") from error


def _plain_blocks(chunk: Chunk, counts: LineCounts) -> Iterator[Block]:
    with open(chunk.file.path, "rb") as stream:
        begin = max(chunk.start - 1, 0)
        stream.seek(begin)
        data = stream.read(chunk.end - begin)
        if len(data) < chunk.end - begin:
            raise DataError(f"{chunk.file.path}: {chunk.file.size} bytes were listed, it ends before. Did it change?")
        start = 0
        if chunk.start:
            # The line under way belongs to an earlier chunk. Only this chunk is searched for its end, so a line of a
            # gigabyte is passed over once, not once per chunk.
            start = data.find(b"\n") + 1
            if start in (0, len(data)):
                return
        counts.begin, counts.end = begin + start, chunk.end
        end = max(data.rfind(b"\n") + 1, start)
        unfinished = len(data) - end
        if start < end:
            yield data, start, end
        if unfinished:
            del data
            # Its end is looked for first, and the line then read at once: a long one is held once, not in pieces.
            stream.seek(chunk.end)
            while (piece := stream.readline(BLOCK)) and not piece.endswith(b"\n"):
                pass
            counts.end = stream.tell()
            stream.seek(chunk.end - unfinished)
            line = stream.read(counts.end - chunk.end + unfinished)
            yield line, 0, len(line)
        counts.bytes += counts.end - counts.begin


def lines_before(chunk: Chunk) -> int:
    """How many lines or rows of its file come before those that a chunk owns. Reads the file up to there."""
    if chunk.file.format == PARQUET:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(chunk.file.path) as parquet:
            return sum(parquet.metadata.row_group(group).num_rows for group in range(chunk.start))
    if not chunk.start:
        return 0
    # The line that is under way where the chunk begins belongs to the one before it.
    lines, left, last = 0, chunk.start, b"\n"
    with open(chunk.file.path, "rb") as stream:
        while left and (block := stream.read(min(left, BLOCK))):
            lines += block.count(b"\n")
            left -= len(block)
            last = block[-1:]
    return lines + (last != b"\n")


def _unpacked_blocks(chunk: Chunk, counts: LineCounts) -> Iterator[Block]:
    pending: list[bytes] = []  # pieces of the line under way: joined once, however long it is
    for piece in _content(chunk.file):
        counts.bytes += len(piece)
        end = piece.rfind(b"\n") + 1
        pending.append(piece[:end] if end else piece)
        if end:
            data = b"".join(pending)
            pending = [piece[end:]]
            yield data, 0, len(data)
    if last := b"".join(pending):
        yield last, 0, len(last)


def read_text(file: InputFile) -> Iterator[str]:
    """The whole content of a file of JSON in blocks, unpacked and decoded, without BOM.

    Raises `DataError` where it cannot be read on, and ValueError where it is not UTF-8.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    for block in _content(file):
        yield decode(block)
    yield decode(b"", True)


def check_packed(file: InputFile) -> None:
    """Read a packed file to its end, where its checksum is: damage may look like bad text before. Raises as `_content`.

    Other files have none.
    """
    if file.format in (GZIP, ZSTD):
        for _ in _content(file):
            pass


def _content(file: InputFile) -> Iterator[bytes]:
    """Raises `DataError` where a file cannot be read, or is packed and damaged."""
    try:
        yield from _unpacked(file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file.path}: the {file.format} file is damaged or cut: {error}. Fetch or pack it again."
                        ) from error
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error}.") from error


def _unpacked(file: InputFile) -> Iterator[bytes]:
    if file.format != ZSTD:
        with (gzip.open if file.format == GZIP else open)(file.path, "rb") as stream:
            while block := stream.read(BLOCK):
                yield block
        return
    import zstandard

    with open(file.path, "rb") as packed:
        frame = None
        while block := packed.read(COMPRESSED_BLOCK):
            while block:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                try:
                    unpacked = frame.decompress(block)
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from error
                if unpacked:
                    yield unpacked
                block = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
        if frame is not None:  # the library itself takes a cut file for a whole one
            raise EOFError("the file ends inside a frame")


def _read_rows(chunk: Chunk, keys: Sequence[str], counts: LineCounts) -> Iterator[Columns | BadRecord]:
    import pyarrow
    import pyarrow.parquet

    path = chunk.file.path
    try:
        with pyarrow.parquet.ParquetFile(path) as parquet:
            _check_columns(path, parquet.schema_arrow, keys)
            batches = parquet.iter_batches(
                ROWS, row_groups=list(range(chunk.start, chunk.end)), columns=list(keys), use_threads=False
            )
            for batch in batches:
                columns = [_texts(batch.column(batch.schema.get_field_index(key)), key) for key in keys]
                for row in zip(*columns, strict=True):
                    counts.lines += 1
                    bad = next((text for text in row if isinstance(text, BadRecord)), None)
                    yield tuple([text] for text in row) if bad is None else bad
                counts.bytes += batch.nbytes
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged Parquet data after row {counts.lines} of row group {chunk.start}: {error}"
                        ) from error


def _check_columns(path: str, schema: "pyarrow.Schema", keys: Sequence[str]) -> None:  # noqa: F821
    """Raises `DataError` for a missing column, or one that holds no strings."""
    import pyarrow

    for key in keys:
        if key not in schema.names:
            raise DataError(f"{path}: no column {key!r}; columns: {', '.join(schema.names)} (choose with --json-keys).")
        kind = schema.field(key).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f"{path}: column {key!r} holds {kind}, not strings.")


def _texts(column: "pyarrow.Array", key: str) -> Iterator[str | BadRecord]:  # noqa: F821
    """The values of a column of strings."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    for value in column.cast(pyarrow.large_binary(), safe=False).to_pylist():
        if value is None:
            yield BadRecord("not_a_string", f"the value of {key!r} is null, not a string")
            continue
        try:
            yield value.decode("utf-8")
        except UnicodeDecodeError as error:
            shown = value[max(error.start - 20, 0) : error.start + 20]
            yield BadRecord("bad_utf8", f"byte {error.start + 1} of {key!r} is not UTF-8, near {shown!r}")
