"""Writer of the engine's indexed dataset, a pair `.bin`/`.idx`, with numpy alone.

The result is byte for byte that of `megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder` (megatron-core
0.19.2) for the same ids. The `.bin` is the ids of all documents, one after another, without header. The `.idx`, little
endian:

    9 bytes   b"MMIDIDX\\0\\0"        8 bytes   version 1        1 byte   dtype code (4 int32, 8 uint16)
    8 bytes   number of sequences     8 bytes   number of document boundaries (documents + 1)
    int32     length of each sequence, in tokens
    int64     position of each sequence in the .bin, in bytes
    int64     first sequence of each document, then the number of sequences

A document is one sequence, or several where it is a pack of samples. Lengths pass through files, so memory does not
grow with the corpus. Everything is written under temporary names, flushed to disk, and renamed only when whole; what a
killed run wrote can be taken up again (`whole_parts`).
"""

import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_mixtral import disk
from megatron_mixtral.data.scratch import checksum
from megatron_mixtral.errors import DataError

HEADER = b"MMIDIDX\x00\x00"
DTYPE_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
BLOCK = 1 << 20  # sequences per block of the index


@dataclass(frozen=True)
class PartSize:
    """What a part adds to a dataset of documents of one sequence: ids, documents, and the CRC-32 of the ids."""

    tokens: int
    documents: int
    checksum: int


class IndexedWriter:
    """Collects documents in `scratch` and publishes `{prefix}.bin` and `{prefix}.idx`.

    `scratch` is an existing directory on the file system of the prefix; its files are the writer's until `publish`.
    With `splits` a document may have several sequences.
    """

    def __init__(
        self, prefix: str | Path, dtype: np.dtype, scratch: str | Path, splits: bool = False,
        kept: Sequence[PartSize] = (),
    ) -> None:  # fmt: skip
        """`kept` are the parts that the files in `scratch` begin with (`whole_parts`); the rest of them is cut off."""
        self.dtype = np.dtype(dtype)
        self.bin_path, self.idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        self._tmp = _temporaries(prefix, scratch)
        self.tokens = sum(part.tokens for part in kept)
        self.sequences = self.documents = sum(part.documents for part in kept)
        self._bin = _open_at(self._tmp["bin"], self.tokens * self.dtype.itemsize)
        self._lengths = _open_at(self._tmp["lengths"], 4 * self.sequences)
        self._splits = _open_at(self._tmp["splits"], 0) if splits else None
        self._streams = [stream for stream in (self._bin, self._lengths, self._splits) if stream is not None]

    def add(self, ids: np.ndarray, lengths: np.ndarray, splits: np.ndarray | None = None) -> None:
        """Append documents: ids of `self.dtype` (total,), lengths int32 (sequences,) with sum total, none of them 0,
        and, where documents have several sequences, int32 (documents,) with sum sequences.
        """
        assert ids.dtype == self.dtype and lengths.dtype == np.int32, "ids and lengths must have the dtypes of the file"
        assert int(lengths.sum(dtype=np.int64)) == ids.size, "the lengths must add up to the ids"
        self._bin.write(ids.tobytes())
        self.tokens += ids.size
        self.add_lengths(lengths, splits)

    def add_part(self, ids_path: str | Path, lengths_path: str | Path) -> None:
        """Append documents of one sequence each: files of raw ids (`self.dtype`), which are not read, and raw lengths
        (int32).
        """
        lengths = np.fromfile(lengths_path, dtype="<i4")
        tokens = int(lengths.sum(dtype=np.int64))
        found = os.path.getsize(ids_path)
        if found != tokens * self.dtype.itemsize:
            raise DataError(f"{ids_path} has {found} bytes; its {tokens} ids need {tokens * self.dtype.itemsize}.")
        self.add_ids(ids_path, tokens)
        self.add_lengths(lengths)

    def add_ids(self, ids_path: str | Path, tokens: int) -> None:
        """Append `tokens` ids of a file, whose lengths the caller adds too (`add_lengths`)."""
        with open(ids_path, "rb") as part:
            append_file(part, self._bin, tokens * self.dtype.itemsize)
        if hasattr(os, "posix_fadvise"):
            # The system begins to write these to the disk now, beside the encoding, instead of all at the last fsync.
            start, size = self.tokens * self.dtype.itemsize, tokens * self.dtype.itemsize
            os.posix_fadvise(self._bin.fileno(), start, size, os.POSIX_FADV_DONTNEED)
        self.tokens += tokens

    def add_lengths(self, lengths: np.ndarray, splits: np.ndarray | None = None) -> None:
        """Append lengths int32 (sequences,), and int32 (documents,) where documents have several sequences."""
        self._lengths.write(lengths.tobytes())
        self.sequences += lengths.size
        if self._splits is None:
            assert splits is None, "each document is one sequence here"
            self.documents += lengths.size
            return
        assert splits is not None and int(splits.sum(dtype=np.int64)) == lengths.size, "splits must add up to sequences"
        self._splits.write(splits.tobytes())
        self.documents += splits.size

    def flush(self) -> None:
        """Hand everything added so far to the system, so that it survives the end of this process."""
        for stream in self._streams:
            stream.flush()

    def finish(self, may_be_empty: bool = False) -> None:
        """Write the index and flush both files to disk, still under their temporary names.

        Raises `DataError` when there is no token (the engine cannot open such a dataset) or the sizes do not fit.
        """
        if self.tokens == 0 and not may_be_empty:
            raise DataError(f"No document with text came out for {self.bin_path}: nothing is written.")
        self.close()
        disk.sync(self._tmp["bin"])
        found, wanted = os.path.getsize(self._tmp["bin"]), self.tokens * self.dtype.itemsize
        if found != wanted:
            raise DataError(f"{self.bin_path} has {found} bytes; {self.tokens} ids need {wanted}. Is the disk full?")
        with open(self._tmp["idx"], "wb") as index:
            code = DTYPE_CODES[self.dtype]
            index.write(HEADER + struct.pack("<QBQQ", 1, code, self.sequences, self.documents + 1))
            with open(self._tmp["lengths"], "rb") as lengths:
                shutil.copyfileobj(lengths, index, 1 << 20)
            for starts in _starts(self._tmp["lengths"]):
                index.write((starts * self.dtype.itemsize).astype("<i8").tobytes())
            for firsts in self._first_sequences():
                index.write(firsts.astype("<i8").tobytes())
            index.write(struct.pack("<q", self.sequences))
        disk.sync(self._tmp["idx"])

    def _first_sequences(self) -> Iterator[np.ndarray]:
        """The first sequence of each document, in blocks."""
        if self._splits is not None:
            return _starts(self._tmp["splits"])
        count = self.documents
        return (np.arange(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))

    def publish(self) -> None:
        """Give both files their final names. An older pair goes first, so that a mixed pair is never seen."""
        self.idx_path.unlink(missing_ok=True)
        os.replace(self._tmp["bin"], self.bin_path)
        os.replace(self._tmp["idx"], self.idx_path)
        self._tmp["lengths"].unlink()
        self._tmp["splits"].unlink(missing_ok=True)
        disk.sync(self.bin_path.parent)

    def close(self) -> None:
        """Close the files; without `publish` nothing is left but what lies in the scratch directory."""
        for stream in self._streams:
            stream.close()


def _temporaries(prefix: str | Path, scratch: str | Path) -> dict[str, Path]:
    """The files of a writer in its scratch directory."""
    name = Path(f"{prefix}.bin").stem
    return {end: Path(scratch) / f"{name}.{end}.tmp" for end in ("bin", "idx", "lengths", "splits")}


def whole_parts(prefix: str | Path, dtype: np.dtype, scratch: str | Path, parts: Sequence[PartSize]) -> int:
    """How many of `parts`, the first ones of a dataset, are whole in the files that a killed writer left."""
    files = _temporaries(prefix, scratch)
    sizes = [files[end].stat().st_size if files[end].exists() else 0 for end in ("bin", "lengths")]
    if not sizes[0]:
        return 0
    with open(files["bin"], "rb") as ids:
        for number, part in enumerate(parts):
            sizes[0] -= part.tokens * np.dtype(dtype).itemsize
            sizes[1] -= 4 * part.documents
            if min(sizes) < 0 or checksum(ids, part.tokens * np.dtype(dtype).itemsize) != part.checksum:
                return number
    return len(parts)


def _open_at(path: Path, size: int) -> BinaryIO:
    """A file for writing after its first `size` bytes."""
    stream = open(path, "r+b" if size else "wb")
    stream.truncate(size)
    stream.seek(size)
    return stream


def _starts(path: Path) -> Iterator[np.ndarray]:
    """Of a file of int32, the sum of all numbers before each (int64), in blocks."""
    total = 0
    with open(path, "rb") as stream:
        while block := stream.read(4 * BLOCK):
            ends = total + np.cumsum(np.frombuffer(block, dtype="<i4"), dtype=np.int64)
            yield np.concatenate(([total], ends[:-1]))
            total = int(ends[-1])


def append_file(source: BinaryIO, target: BinaryIO, size: int) -> None:
    """Append `size` bytes of `source`, from its start, to `target`; in the kernel where the system can.

    Raises `DataError` when the source ends early.
    """
    target.flush()
    left = size
    while left and hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(source.fileno(), target.fileno(), left)
        except OSError:
            break  # not on this file system or kernel: the loop below copies what is left
        if copied == 0:
            break
        left -= copied
    # The kernel moved both file positions; the buffered target learns of it by seeking.
    target.seek(0, os.SEEK_END)
    while left:
        block = source.read(min(left, 1 << 20))
        if not block:
            raise DataError(f"{source.name} ended {left} bytes early.")
        target.write(block)
        left -= len(block)
