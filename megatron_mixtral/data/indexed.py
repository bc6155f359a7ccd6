"""Writer of the engine's indexed dataset, a pair `.bin`/`.idx`, with numpy alone.

The result is byte for byte that of `megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder` (megatron-core
0.19.2) for the same ids. The `.bin` is the ids of all documents, one after another, without header. The `.idx`, little
endian:

    9 bytes   b"MMIDIDX\\0\\0"        8 bytes   version 1        1 byte   dtype code (4 int32, 8 uint16)
    8 bytes   number of sequences     8 bytes   number of document boundaries (documents + 1)
    int32     length of each sequence, in tokens
    int64     position of each sequence in the .bin, in bytes
    int64     first sequence of each document, then the number of sequences

Here each document is one sequence. Lengths pass through a file, so memory does not grow with the corpus. Everything is
written under temporary names, flushed to disk, and renamed only when whole.
"""

import os
import shutil
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_mixtral.errors import DataError

HEADER = b"MMIDIDX\x00\x00"
DTYPE_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
BLOCK = 1 << 20  # sequences per block of the index


class IndexedWriter:
    """Collects documents in `scratch` and publishes `{prefix}.bin` and `{prefix}.idx`.

    `scratch` is an existing directory on the file system of the prefix; its files are the writer's until `publish`.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype, scratch: str | Path) -> None:
        self.dtype = np.dtype(dtype)
        self.code = DTYPE_CODES[self.dtype]
        self.bin_path, self.idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        stem = Path(scratch) / self.bin_path.stem
        self._bin_tmp, self._idx_tmp, self._lengths_tmp = (
            stem.with_name(stem.name + end) for end in (".bin.tmp", ".idx.tmp", ".lengths.tmp")
        )
        self._bin: BinaryIO = open(self._bin_tmp, "wb")
        self._lengths: BinaryIO = open(self._lengths_tmp, "wb")
        self.documents = 0
        self.tokens = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: ids of `self.dtype` (total,), lengths int32 (documents,) with sum total, none of them 0."""
        assert ids.dtype == self.dtype and lengths.dtype == np.int32, "ids and lengths must have the dtypes of the file"
        assert int(lengths.sum(dtype=np.int64)) == ids.size, "the lengths must add up to the ids"
        self._bin.write(ids.tobytes())
        self._lengths.write(lengths.tobytes())
        self.documents += lengths.size
        self.tokens += ids.size

    def add_part(self, ids_path: str | Path, lengths_path: str | Path) -> None:
        """Append the documents of two files of raw ids (`self.dtype`) and raw lengths (int32); the ids are not read."""
        lengths = np.fromfile(lengths_path, dtype="<i4")
        tokens = int(lengths.sum(dtype=np.int64))
        found = os.path.getsize(ids_path)
        if found != tokens * self.dtype.itemsize:
            raise DataError(f"{ids_path} has {found} bytes; its {tokens} ids need {tokens * self.dtype.itemsize}.")
        with open(ids_path, "rb") as part:
            append_file(part, self._bin, found)
        self._lengths.write(lengths.tobytes())
        self.documents += lengths.size
        self.tokens += tokens

    def finish(self) -> None:
        """Write the index and flush both files to disk, still under their temporary names.

        Raises `DataError` when there is no token (the engine cannot open such a dataset) or the sizes do not fit.
        """
        if self.tokens == 0:
            raise DataError(f"No document with text came out for {self.bin_path}: nothing is written.")
        _flush(self._bin)
        _flush(self._lengths)
        found, wanted = os.path.getsize(self._bin_tmp), self.tokens * self.dtype.itemsize
        if found != wanted:
            raise DataError(f"{self.bin_path} has {found} bytes; {self.tokens} ids need {wanted}. Is the disk full?")
        with open(self._idx_tmp, "wb") as index:
            index.write(HEADER + struct.pack("<QBQQ", 1, self.code, self.documents, self.documents + 1))
            with open(self._lengths_tmp, "rb") as lengths:
                shutil.copyfileobj(lengths, index, 1 << 20)
                self._write_pointers(lengths, index)
            for start in range(0, self.documents + 1, BLOCK):
                index.write(np.arange(start, min(start + BLOCK, self.documents + 1), dtype="<i8").tobytes())
            index.flush()
            os.fsync(index.fileno())

    def _write_pointers(self, lengths: BinaryIO, index: BinaryIO) -> None:
        """The byte position of each sequence: the sum of the lengths before it, times the size of an id."""
        position = 0
        lengths.seek(0)
        while block := lengths.read(4 * BLOCK):
            ends = np.cumsum(np.frombuffer(block, dtype="<i4"), dtype=np.int64) * self.dtype.itemsize + position
            index.write(np.concatenate(([position], ends[:-1])).astype("<i8").tobytes())
            position = int(ends[-1])

    def publish(self) -> None:
        """Give both files their final names. An older pair goes first, so that a mixed pair is never seen."""
        self.idx_path.unlink(missing_ok=True)
        os.replace(self._bin_tmp, self.bin_path)
        os.replace(self._idx_tmp, self.idx_path)
        self._lengths_tmp.unlink()
        directory = os.open(self.bin_path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def close(self) -> None:
        """Close the files; without `publish` nothing is left but what lies in the scratch directory."""
        self._bin.close()
        self._lengths.close()


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


def _flush(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
