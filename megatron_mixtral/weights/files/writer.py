"""Writing planned files: threads write parts of them side by side, and the disk works while they go on.

Everything that takes time here releases the interpreter's lock. Mapped pages of the source are given back on the way,
so memory does not grow with the model. Called by `convert`.
"""

import os
import threading
import zlib
from collections.abc import Buffer, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

from megatron_mixtral.disk import sync
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.dtypes import finite
from megatron_mixtral.weights.files.file_layout import FileLayout, Placed

RELEASE = 1 << 26  # bytes moved between two releases of mapped pages
PART = 1 << 27  # bytes of a file that a thread writes at a time
FLUSH = 1 << 25  # bytes written to a file before the disk is started on them


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


class FileWriter:
    """One planned file being written, in parts: runs of consecutive payloads that threads write side by side.

    Whoever writes the last part completes the file, flushes it to the disk and gives `done` the names of tensors with
    NaN or Inf, if they are looked for.
    """

    def __init__(self, path: Path, layout: FileLayout, meter: Meter, check_finite: bool,
                 done: Callable[[list[str]], None]) -> None:
        self.path, self.layout = path, layout
        self._meter, self._check_finite, self._done = meter, check_finite, done
        self._crcs, self._bad = [0] * len(layout.placed), set[int]()
        self._handle: int | None = None
        self._lock = threading.Lock()
        self.parts = _parts(layout.placed)
        self._left = len(self.parts)

    def write(self, part: range) -> None:
        """Write what has these numbers. Raises `CheckpointError` naming a tensor, `OSError` where the disk is full.

        After an exception the file is not completed; `close` it.
        """
        handle = self._open()
        flusher = _Flusher(handle, self.layout.placed[part[0]].offset if part else 0)
        for number in part:
            placed = self.layout.placed[number]
            payload, at, crc, good = placed.payload, placed.offset, 0, True
            tensor = payload.dtype is not None
            _write(handle, placed.before, at - len(placed.before))
            for block in payload.blocks():
                if tensor:
                    crc = zlib.crc32(block, crc)
                    good = good and (not self._check_finite or finite(block, payload.dtype))
                _write(handle, block, at)
                size = memoryview(block).nbytes
                at += size
                self._meter.add(size)
                flusher.reached(at)
            if at - placed.offset != payload.size:
                raise CheckpointError(f"{self.path.name}: {payload.name} has {at - placed.offset} bytes, planned were "
                                      f"{payload.size}")
            _write(handle, placed.after(crc), at)
            self._crcs[number] = crc
            if not good:
                self._bad.add(number)
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._complete(handle)

    def _open(self) -> int:
        """The file, created with all of its room at the first call."""
        with self._lock:
            if self._handle is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
                if hasattr(os, "posix_fallocate") and self.layout.size:
                    os.posix_fallocate(self._handle, 0, self.layout.size)
            return self._handle

    def _complete(self, handle: int) -> None:
        _write(handle, self.layout.end(self._crcs), self.layout.end_at)
        self.close()
        sync(self.path)
        self._done([self.layout.placed[number].payload.name for number in sorted(self._bad)])

    def close(self) -> None:
        """Close the file, complete or not."""
        with self._lock:
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None


def _parts(placed: Sequence[Placed]) -> list[range]:
    """Runs of consecutive payloads of about `PART` bytes together; one empty run for a file without any."""
    starts, size = [0], 0
    for number, one in enumerate(placed):
        if size >= PART:
            starts.append(number)
            size = 0
        size += one.payload.size
    return [range(start, end) for start, end in pairwise([*starts, len(placed)])]


def write_files(root: Path, files: Mapping[str, FileLayout], meter: Meter, jobs: int | None, check_finite: bool,
                done: Callable[[str, list[str]], None]) -> None:
    """Write files below `root`, `jobs` parts at a time. The first failure stops the others and is raised.

    `done` is told each file that is on the disk, and its tensors with NaN or Inf, if they are looked for.
    """

    def write(writer: FileWriter, part: range) -> None:
        try:
            meter.add(0)
            writer.write(part)
        except BaseException:
            meter.stopped = True
            raise

    writers = [FileWriter(root / path, layout, meter, check_finite, partial(done, path))
               for path, layout in files.items()]
    tasks = [(writer, part) for writer in writers for part in writer.parts]
    try:
        with ThreadPoolExecutor(workers(jobs, len(tasks))) as pool:
            futures = [pool.submit(write, *task) for task in tasks]
            try:
                failures = [error for error in (future.exception() for future in futures) if error is not None]
            except BaseException:  # an interrupt reaches this thread only
                meter.stopped = True
                raise
    finally:
        for writer in writers:
            writer.close()
    if failures:
        raise next((error for error in failures if not str(error).startswith("stopped,")), failures[0])


def workers(jobs: int | None, tasks: int) -> int:
    """How many threads to use: as many as asked, else as cores this process may use; at most one for each task."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(jobs or cores, tasks))


class _Flusher:
    """Starts the disk on what has been written of a file, and lets go of what has reached it.

    Without it all would wait for the `fsync` at the end of the file, and the page cache would fill with what nobody
    is going to read. Linux does both on the same advice: it starts to write pages that are not on the disk yet, and
    forgets those that are. What was started a step ago usually is.
    """

    def __init__(self, handle: int, start: int) -> None:
        self._handle, self._start, self._next = handle, start, start

    def reached(self, at: int) -> None:
        """The file is written up to byte `at`."""
        if at - self._next >= FLUSH and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle, self._start, at - self._start, os.POSIX_FADV_DONTNEED)
            self._start, self._next = self._next, at


def _write(handle: int, data: Buffer, at: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        count = os.pwrite(handle, view, at)
        view, at = view[count:], at + count
