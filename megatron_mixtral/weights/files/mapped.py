"""Files of weights, for reading: their tensors as arrays over mapped files, and `Reader`, which fetches the bytes.

The arrays say where numbers lie; cutting and reshaping them touches no byte. `Reader` reads what is left of them from
the file, block by block: a mapped page of a file that has become shorter would end the process without a word (SIGBUS),
a read that comes up short is an error like any other. Nor does reading leave mapped pages behind.
"""

import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy

from megatron_mixtral.disk import START, placeholder
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.files.sums import Sums, checksum, crc32

BLOCK = 1 << 20  # bytes of a region that are read at a time


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: bit patterns where they are mapped, and torch's name of their type.

    `data` is None for types that no weight has (random states, counters, quantized numbers); they are not looked at.
    """

    data: numpy.ndarray | None
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Region:
    """Bytes [offset, offset + length) of a file."""

    file: Path
    offset: int
    length: int

    def blocks(self) -> Iterator[bytes]:
        """The bytes in order. Raises `CheckpointError` when the file ends before they do."""
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            left = self.length
            while left:
                block = file.read(min(BLOCK, left))
                if not block:
                    raise CheckpointError(f"{self.file} ends {left} bytes before byte {self.offset + self.length}; "
                                          "is it being written?")
                left -= len(block)
                yield block


State = tuple[int, int, int]  # of a file: its size, when it was written last (ns), and which one it is (inode)


def state_of(file: str | Path | int) -> State:
    """What tells a file that was written anew from the one that was there. Raises `OSError`."""
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns, found.st_ino


def check_same(path: Path, before: State, now: State) -> None:
    """Raise `CheckpointError` where a source file is no longer what it was."""
    if before != now:
        how = f"had {before[0]} bytes and has {now[0]}" if before[0] != now[0] else "was written anew"
        raise CheckpointError(f"{path} {how} since it was opened; start again when nothing writes to it any more")


class MappedFile:
    """A file as read-only memory. Raises `CheckpointError` when it is empty, cannot be opened, or is
    none of weights (`placeholder`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self.state = state_of(file.fileno())
                self.bytes = _Memory(file.fileno(), 0, access=mmap.ACCESS_READ)
                cure = placeholder(os.pread(file.fileno(), START, 0))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        self.bytes.file, self.address = self, _address(numpy.frombuffer(self.bytes, numpy.uint8))
        self.sums = Sums()
        if cure is not None:
            raise CheckpointError(f"{path} {cure}")

    def array(self, carrier: numpy.dtype, shape: tuple[int, ...], offset: int,
              strides: tuple[int, ...] | None = None) -> numpy.ndarray:
        """The array of `shape` whose first element is at byte `offset`; strides in elements, None: contiguous."""
        steps = None if strides is None else tuple(step * carrier.itemsize for step in strides)
        return numpy.ndarray(shape, carrier, self.bytes, offset, steps)


class _Memory(mmap.mmap):
    """Mapped memory that knows its file."""

    file: MappedFile


def _address(array: numpy.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _file_of(array: numpy.ndarray) -> MappedFile | None:
    """The file that an array lies in; None for one in ordinary memory."""
    base: object = array
    while isinstance(base, numpy.ndarray):
        base = base.base
    return base.file if isinstance(base, _Memory) else None


def _sum_of(file: MappedFile, offset: int, length: int) -> int:
    return checksum(Region(file.path, offset, length).blocks())


class Reader:
    """Reads from mapped files, each opened at its first use and closed when the `with` block ends.

    What it fetches is summed up for `MappedFiles.check_sums`, unless `summed` is False.
    Raises `CheckpointError` for a file that changed since it was mapped.
    """

    def __init__(self, *, summed: bool = True) -> None:
        self._handles: dict[MappedFile, int] = {}
        self._summed = summed
        self._runs: dict[MappedFile, tuple[int, int, int]] = {}  # what was fetched last in one go: start, end, CRC

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            os.close(handle)
        for file, (start, end, crc) in self._runs.items():
            file.sums.note(start, end - start, crc)

    def _handle(self, file: MappedFile) -> int:
        if file not in self._handles:
            try:
                self._handles[file] = os.open(file.path, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{file.path} cannot be read any more: {error}") from None
            check_same(file.path, file.state, state_of(self._handles[file]))
        return self._handles[file]

    def read(self, file: MappedFile, offset: int, count: int) -> bytes:
        """At most `count` bytes from `offset` on: fewer at the end of the file."""
        return os.pread(self._handle(file), count, offset)

    def fetch(self, array: numpy.ndarray) -> numpy.ndarray:
        """The numbers of a mapped array in memory of their own; an array in ordinary memory as it is, contiguous."""
        file = _file_of(array)
        if file is None or array.size == 0:
            return numpy.ascontiguousarray(array)
        found = numpy.empty(array.shape, array.dtype)
        self._fill(found, array, file)
        return found

    def _fill(self, found: numpy.ndarray, array: numpy.ndarray, file: MappedFile) -> None:
        """Read an array into a contiguous one, run by run."""
        if array.flags.c_contiguous:
            left, at = memoryview(found.reshape(-1)).cast("B"), _address(array) - file.address
            while left:
                count = os.preadv(self._handle(file), [left], at)
                if count == 0:
                    raise CheckpointError(f"{file.path} ends at byte {at}; start again when nothing writes to it")
                self._sum(file, at, left[:count])
                left, at = left[count:], at + count
        elif array.ndim > 1 and array.strides[-1] == array.itemsize:
            for one, part in zip(found, array, strict=True):
                self._fill(one, part, file)
        else:
            self._copy(found, array, file)

    def _sum(self, file: MappedFile, at: int, block: memoryview) -> None:
        if not self._summed or not file.sums:
            return
        start, end, crc = self._runs.get(file, (at, at, 0))
        if end != at:
            file.sums.note(start, end - start, crc)
            start, crc = at, 0
        self._runs[file] = (start, at + len(block), crc32(block, crc))

    def _copy(self, found: numpy.ndarray, array: numpy.ndarray, file: MappedFile) -> None:
        """Out of mapped memory, for what is transposed, in files of older engines: no run could be read at once."""
        check_same(file.path, file.state, state_of(self._handle(file)))
        file.sums.note(_address(array) - file.address, 0, 0)
        found[...] = array


class MappedFiles(dict[Path, MappedFile]):
    """Files by path, each mapped when it is first asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._watched: dict[Path, State] = {}

    def __missing__(self, path: Path) -> MappedFile:
        return self.setdefault(path, MappedFile(path))

    def watch(self, paths: Iterable[Path]) -> dict[Path, State]:
        """Note the state of other files for `check_unchanged`; of all these files, each as it was when first seen."""
        for path in paths:
            self._watched.setdefault(path, state_of(path))
        return self._watched | {path: file.state for path, file in self.items()}

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` naming a mapped or watched file that is no longer the one that was there."""
        for path, before in self.watch(()).items():
            try:
                now = state_of(path)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read any more: {error}") from None
            check_same(path, before, now)

    def check_sums(self, *, fill: bool = True) -> None:
        """Raise `CheckpointError` naming a file of which something was fetched that is not what was saved.

        Where a storage was read in part, `fill` reads the rest of it; else it is not looked at.
        """
        for file in list(self.values()):
            file.sums.check(str(file.path), partial(_sum_of, file) if fill else None)

    def release(self) -> None:
        """Give mapped pages back to the system that were touched without a `Reader`; they come again when touched."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for file in list(self.values()):  # other threads map more
                file.bytes.madvise(mmap.MADV_DONTNEED)
