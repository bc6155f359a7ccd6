"""Moving weights: the bytes of a slice, block after block, from mapped sources into planned files.

Whole runs go from the mapped source to the output without another copy; columns are gathered in a small buffer.
Files are written side by side by threads (everything that takes time here releases the interpreter's lock), each file
from front to back. Mapped pages are given back as the work proceeds, so memory does not grow with the model.
"""

import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.container import Container
from megatron_mixtral.weights.dtypes import FLOATS, cast, finite
from megatron_mixtral.weights.fragments import Fragment, TensorSource
from megatron_mixtral.weights.plan import TensorSlice

BLOCK = 1 << 20  # bytes handled at a time: small enough to stay in the cache between checksum and write
RELEASE = 1 << 26  # bytes moved between two releases of mapped pages


def blocks(target: TensorSlice, source: TensorSource, dtype: str | None = None) -> Iterator[numpy.ndarray]:
    """The stored bytes of `target` in order, as contiguous carrier arrays of about `BLOCK` bytes, in type `dtype`.

    None keeps the source's type, which all pieces must share (`stored_type`).
    """
    parts = [source.fragments(piece) for piece, _, _ in target.piece_spans()]
    for run, kind in _runs(target, parts):
        for block in _cut(run):
            yield block if dtype in (None, kind) else cast(block, kind, dtype)
    if target.padding:
        kind = FLOATS[dtype or parts[0][0].dtype]
        yield from _cut(numpy.zeros((target.padding, *target.view[1:]), kind.carrier))


def _runs(target: TensorSlice, parts: list[list[Fragment]]) -> Iterator[tuple[numpy.ndarray, str]]:
    """Arrays that are `target` when laid one behind the other, each with its type. Padding is not among them."""
    dim, start, end = target.rule.shard_dim, target.start, target.start + target.length - target.padding
    if dim == len(target.view) - 1 and dim > 0:
        yield from _columns(target, parts[0])
    elif len(parts) > 1 and target.rule.join_dim > dim:  # pieces alternate, unit by unit
        assert dim == 0, f"{target.rule.name}: joined inside of dim {dim}"
        for unit in range(start, end):
            for fragments in parts:
                part = next(f for f in fragments if f.start <= unit < f.start + f.length)
                yield part.data[unit - part.start], part.dtype
    else:
        for fragments in parts:
            for part in fragments:
                low, high = max(start, part.start), min(end, part.start + part.length)
                if low < high:
                    yield part.data[(slice(None),) * dim + (slice(low - part.start, high - part.start),)], part.dtype


def _columns(target: TensorSlice, fragments: list[Fragment]) -> Iterator[tuple[numpy.ndarray, str]]:
    """The rows of a slice of columns, a block at a time."""
    rows, width = target.view
    kind = fragments[0].dtype
    parts = [(max(target.start, f.start), min(target.start + target.length, f.start + f.length), f) for f in fragments]
    parts = [(low, high, f) for low, high, f in parts if low < high]
    if len(parts) == 1 and parts[0][2].length == width and parts[0][2].data.flags.c_contiguous:
        yield parts[0][2].data, kind
        return
    step = max(1, BLOCK // (width * FLOATS[kind].itemsize))
    for row in range(0, rows, step):
        block = numpy.empty((min(step, rows - row), width), FLOATS[kind].carrier)
        for low, high, part in parts:
            block[:, low - target.start:high - target.start] = \
                part.data[row:row + step, low - part.start:high - part.start]
        yield block, kind


def _cut(run: numpy.ndarray) -> Iterator[numpy.ndarray]:
    """A run in contiguous blocks."""
    if run.nbytes <= BLOCK:
        yield numpy.ascontiguousarray(run).reshape(-1)
    elif run.flags.c_contiguous:
        flat, step = run.reshape(-1), BLOCK // run.itemsize
        for at in range(0, len(flat), step):
            yield flat[at:at + step]
    else:
        for part in run:
            yield from _cut(part)


class Meter:
    """Counts bytes over all threads: gives mapped pages back, reports progress, and carries a stop to every thread."""

    def __init__(self, release: Callable[[], None], progress: Callable[[int], None] | None = None) -> None:
        self.total, self._release, self._progress = 0, release, progress
        self._lock, self._next, self.stopped = threading.Lock(), RELEASE, False

    def add(self, count: int) -> None:
        """Note `count` more bytes. Raises `CheckpointError` when another thread has failed."""
        if self.stopped:
            raise CheckpointError("stopped, because another file failed")
        with self._lock:
            self.total += count
            due = self.total >= self._next
            if due:
                self._next = self.total + RELEASE
        if due:
            self._release()
            if self._progress is not None:
                self._progress(self.total)


def write_file(path: Path, container: Container, source: TensorSource, meter: Meter, *,
               check_finite: bool = False) -> list[str]:
    """Write a planned file and flush it to the disk; the names of tensors with NaN or Inf, if they are looked for.

    Raises `CheckpointError` naming the tensor, `OSError` where the disk is full.
    """
    bad: list[str] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        if hasattr(os, "posix_fallocate") and container.size:
            os.posix_fallocate(handle, 0, container.size)
        crcs = []
        for placed in container.placed:
            at, crc, good = placed.offset, 0, True
            for block in blocks(placed.tensor, source, placed.dtype):
                crc = zlib.crc32(block, crc)
                good = good and (not check_finite or finite(block, placed.dtype))
                _write(handle, memoryview(block).cast("B"), at)
                at += block.nbytes
                meter.add(block.nbytes)
            if at - placed.offset != placed.size:
                raise CheckpointError(f"{path.name}: {placed.tensor.name} has {at - placed.offset} bytes, planned were "
                                      f"{placed.size}")
            crcs.append(crc)
            if not good:
                bad.append(placed.tensor.name)
        for offset, data in container.fixed(crcs):
            _write(handle, memoryview(data), offset)
        os.fsync(handle)
    finally:
        os.close(handle)
    return bad


def _write(handle: int, data: memoryview, at: int) -> None:
    while data:
        count = os.pwrite(handle, data, at)
        data, at = data[count:], at + count


def checksum(target: TensorSlice, source: TensorSource, dtype: str | None = None) -> int:
    """CRC-32 of the stored bytes of a slice."""
    crc = 0
    for block in blocks(target, source, dtype):
        crc = zlib.crc32(block, crc)
    return crc


def total_bytes(containers: Iterable[Container]) -> int:
    """Size of files together."""
    return sum(container.size for container in containers)
