"""Writing planned files: threads write tensors side by side, and the disk works while they go on.

Everything that takes time here releases the interpreter's lock. Called by `convert`.
"""

import os
import threading
from collections.abc import Buffer, Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import batched, zip_longest
from pathlib import Path

from megatron_mixtral.disk import sync
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.dtypes import finite
from megatron_mixtral.weights.files.file_layout import FileLayout, crc32

PROGRESS = 1 << 26  # bytes moved between two reports
FLUSH = 1 << 25  # bytes of a tensor written before the disk is started on them


class Meter:
    """Counts bytes over all threads, reports progress, and carries a stop to every thread."""

    def __init__(self, progress: Callable[[int], None] | None = None) -> None:
        self.total, self._progress = 0, progress
        self._lock, self._next, self.stopped = threading.Lock(), PROGRESS, False

    def add(self, count: int) -> None:
        """Note `count` more bytes. Raises `CheckpointError` when another thread has failed."""
        if self.stopped:
            raise CheckpointError("stopped, because another file failed")
        with self._lock:
            self.total += count
            due = self.total >= self._next
            if due:
                self._next = self.total + PROGRESS
        if due and self._progress is not None:
            self._progress(self.total)


class FileWriter:
    """One planned file being written: made when its first bytes come, and completed and flushed with the last.

    `done` is then given the names of tensors with NaN or Inf, if they were looked for.
    """

    def __init__(self, path: Path, layout: FileLayout, done: Callable[[list[str]], None]) -> None:
        self.path, self.layout, self._done = path, layout, done
        self._crcs, self._bad, self._left = [0] * len(layout.placed), set[int](), len(layout.placed)
        self._handle: int | None = None
        self._lock = threading.Lock()

    def open(self) -> int:
        """The file, created at the first call."""
        with self._lock:
            if self._handle is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            return self._handle

    def finish(self, number: int, crc: int, good: bool) -> None:
        """The payload of this number is written; the last one completes the file."""
        with self._lock:
            self._crcs[number] = crc
            if not good:
                self._bad.add(number)
            self._left -= 1
            if self._left:
                return
        _write(self.open(), self.layout.end(self._crcs), self.layout.end_at)
        self.close()
        sync(self.path)
        self._done([self.layout.placed[number].payload.name for number in sorted(self._bad)])

    def close(self) -> None:
        """Close the file, complete or not."""
        with self._lock:
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None


class _Target:
    """The place of one payload in a file that is being written."""

    def __init__(self, file: FileWriter, number: int) -> None:
        self.file, self.number, self.placed = file, number, file.layout.placed[number]
        self._at, self._flushed, self._started = self.placed.offset, self.placed.offset, self.placed.offset
        self._handle = -1

    def begin(self) -> None:
        self._handle = self.file.open()
        _write(self._handle, self.placed.before, self._at - len(self.placed.before))

    def put(self, block: Buffer) -> None:
        """Write the next bytes, and start the disk on what has been written."""
        _write(self._handle, block, self._at)
        self._at += memoryview(block).nbytes
        if self._at - self._started >= FLUSH:
            self._flush()

    def end(self, crc: int, good: bool) -> None:
        """Raises `CheckpointError` unless as many bytes came as were planned."""
        payload, count = self.placed.payload, self._at - self.placed.offset
        if count != payload.size:
            raise CheckpointError(f"{self.file.path.name}: {payload.name} has {count} bytes, planned were "
                                  f"{payload.size}")
        _write(self._handle, self.placed.after(crc), self._at)
        if self._at > self._started:
            self._flush()
        self.file.finish(self.number, crc, good)

    def _flush(self) -> None:
        """Without it all would wait for the `fsync` at the end of the file, and the page cache would fill with what
        nobody is going to read. Linux does both on the same advice: it starts to write pages that are not on the disk
        yet, and forgets those that are. What was started a step ago usually is.
        """
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle, self._flushed, self._at - self._flushed, os.POSIX_FADV_DONTNEED)
            self._flushed, self._started = self._started, self._at


def _pass(targets: list[_Target], meter: Meter, check_finite: bool) -> None:
    """Write payloads of one key in one pass over their source.

    Raises `CheckpointError` naming a tensor, `OSError` where the disk is full.
    """
    parts: dict[Hashable, list[_Target]] = {}
    for target in targets:
        target.begin()
        parts.setdefault(target.placed.payload.part, []).append(target)
    payload, each = targets[0].placed.payload, list(parts.values())
    summed = [any(target.placed.summed for target in same) for same in each]
    crcs, good = [0] * len(each), [True] * len(each)
    for blocks in payload.blocks(list(parts)):
        for index, (block, same) in enumerate(zip(blocks, each, strict=True)):
            if summed[index]:
                crcs[index] = crc32(block, crcs[index])
            if check_finite and payload.dtype is not None:
                good[index] = good[index] and finite(block, payload.dtype)
            for target in same:
                target.put(block)
                meter.add(memoryview(block).nbytes)
    for crc, fine, same in zip(crcs, good, each, strict=True):
        for target in same:
            target.end(crc, fine)


def _passes(files: list[FileWriter], threads: int) -> list[list[_Target]]:
    """What is to be written, grouped by what one pass over the source gives.

    The kernel lets one thread at a time write to a file. So as many files as there are threads take turns, and then the
    next ones; those that share passes (the tensor-parallel ranks of a pipeline stage) count as one.
    """
    found: dict[Hashable, list[_Target]] = {}
    for file in files:
        for number, placed in enumerate(file.layout.placed):
            key = placed.payload.key
            found.setdefault((file.path, number) if key is None else key, []).append(_Target(file, number))
    by_file: dict[Path, list[list[_Target]]] = {}
    for targets in found.values():
        by_file.setdefault(targets[0].file.path, []).append(targets)
    return [targets for some in batched(by_file.values(), threads) for turn in zip_longest(*some)
            for targets in turn if targets is not None]


def write_files(root: Path, files: Mapping[str, FileLayout], meter: Meter, jobs: int | None, check_finite: bool,
                done: Callable[[str, list[str]], None]) -> None:
    """Write files below `root`, `jobs` tensors at a time. The first failure stops the others and is raised.

    `done` is told each file that is on the disk, and its tensors with NaN or Inf, if they are looked for.
    """

    def write(targets: list[_Target]) -> None:
        try:
            meter.add(0)
            _pass(targets, meter, check_finite)
        except BaseException:
            meter.stopped = True
            raise

    writers = [FileWriter(root / path, layout, partial(done, path)) for path, layout in files.items()]
    threads = workers(jobs, sum(len(layout.placed) for layout in files.values()))
    tasks = _passes(writers, threads)
    try:
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(write, task) for task in tasks]
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


def _write(handle: int, data: Buffer, at: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        count = os.pwrite(handle, view, at)
        view, at = view[count:], at + count
