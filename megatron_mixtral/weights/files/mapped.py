"""Files mapped into memory for reading: bytes become arrays where they lie, and pages are given back after use."""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy

from megatron_mixtral.errors import CheckpointError

BLOCK = 1 << 20  # bytes of a region that are read at a time
# What a download leaves in the place of weights, by how it begins: no format that is read here begins so.
NO_WEIGHTS = {
    b"version https://git-lfs": "is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder",
    b"<!doctype html": "is a web page (of a log-in or an error?), not the file itself; download it again",
    b"<html": "is a web page (of a log-in or an error?), not the file itself; download it again",
}


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


class MappedFile:
    """A file as read-only memory. Raises `CheckpointError` when it is empty, cannot be opened or is of `NO_WEIGHTS`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        start = self.bytes[:64].lstrip().lower()
        for sign, cure in NO_WEIGHTS.items():
            if start.startswith(sign):
                raise CheckpointError(f"{path} {cure}")

    def array(self, carrier: numpy.dtype, shape: tuple[int, ...], offset: int,
              strides: tuple[int, ...] | None = None) -> numpy.ndarray:
        """The array of `shape` whose first element is at byte `offset`; strides in elements, None: contiguous."""
        steps = None if strides is None else tuple(step * carrier.itemsize for step in strides)
        return numpy.ndarray(shape, carrier, self.bytes, offset, steps)


class MappedFiles(dict[Path, MappedFile]):
    """Files by path, each mapped when it is first asked for."""

    def __missing__(self, path: Path) -> MappedFile:
        return self.setdefault(path, MappedFile(path))

    def release(self) -> None:
        """Give the mapped pages back to the system; they come again when touched."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for file in list(self.values()):  # other threads map more
                file.bytes.madvise(mmap.MADV_DONTNEED)
