"""Processes that turn chunks of input into part files, and the parent's side of talking to them.

A task is a `Chunk`; its answer is a `ChunkResult` of a few numbers. Ids and lengths never travel between processes: a
worker writes them to two raw files per key in the scratch directory, where `data/preprocess.py` picks them up in order.
Workers are started fresh (spawn), so no thread or lock of the parent can be caught half-way in them.
"""

import logging
import multiprocessing
import os
import signal
import traceback
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import numpy as np

from megatron_mixtral.data.encoding import DocumentEncoder
from megatron_mixtral.data.readers import BadRecord, Chunk, LineCounts, parse_record, read_lines
from megatron_mixtral.errors import DataError, MixtralError

logger = logging.getLogger(__name__)

BATCH_CHARACTERS = 1 << 20  # text held before it is encoded and written
BAD_LINES_KEPT = 50  # per chunk, for the report; the counts are always complete


@dataclass(frozen=True)
class Job:
    """What is the same for every chunk of a run."""

    encoder: DocumentEncoder
    keys: tuple[str, ...]
    scratch: str
    skip_bad_lines: bool


@dataclass
class KeyCounts:
    """One key of one chunk: documents written, empty texts dropped, ids written, UTF-8 bytes of the texts written.

    `control_documents` and `control_tokens`: see `encoding.ControlCounts`.
    """

    documents: int = 0
    empty: int = 0
    tokens: int = 0
    text_bytes: int = 0
    control_documents: int = 0
    control_tokens: int = 0


@dataclass
class BadLine:
    """`line` counts from 1 within the chunk."""

    line: int
    reason: str
    message: str


@dataclass
class ChunkResult:
    """The account of one chunk. `failed`: reading stopped at the (only) bad line, since bad lines are not skipped."""

    index: int
    counts: LineCounts = field(default_factory=LineCounts)
    keys: list[KeyCounts] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    failed: bool = False


def part_paths(scratch: str, chunk_index: int, key_index: int) -> tuple[str, str]:
    """The files of a chunk's ids and lengths for one key."""
    stem = os.path.join(scratch, f"part-{chunk_index:08d}-{key_index}")
    return stem + ".ids", stem + ".lengths"


def encode_chunk(chunk: Chunk, job: Job) -> ChunkResult:
    """Read, encode and write one chunk. Memory is bounded by one batch of text and its ids, whatever the chunk's size.

    Raises `DataError` when the file cannot be read or the tokenizer misbehaves; a bad line is in the result instead.
    """
    result = ChunkResult(chunk.index, keys=[KeyCounts() for _ in job.keys])
    parts = [
        _PartWriter(part_paths(job.scratch, chunk.index, n), job.encoder, result.keys[n]) for n in range(len(job.keys))
    ]
    try:
        for line in read_lines(chunk, result.counts):
            try:
                texts = parse_record(line, job.keys)
            except BadRecord as error:
                skipped = result.counts.skipped
                skipped[error.reason] = skipped.get(error.reason, 0) + 1
                if len(result.bad) < BAD_LINES_KEPT:
                    result.bad.append(BadLine(result.counts.lines, error.reason, str(error)))
                if not job.skip_bad_lines:
                    result.failed = True
                    return result
                continue
            for part, text in zip(parts, texts, strict=True):
                part.add(text)
        for part in parts:
            part.write_batch()
    finally:
        for part in parts:
            part.close()
    return result


class _PartWriter:
    """Gathers the texts of one key and writes their ids and lengths batch by batch."""

    def __init__(self, paths: tuple[str, str], encoder: DocumentEncoder, counts: KeyCounts) -> None:
        self._ids, self._lengths = open(paths[0], "wb"), open(paths[1], "wb")
        self._encoder, self._counts = encoder, counts
        self._texts: list[str] = []
        self._characters = 0

    def add(self, text: str) -> None:
        if not text:
            self._counts.empty += 1
            return
        self._texts.append(text)
        self._characters += len(text)
        if self._characters >= BATCH_CHARACTERS:
            self.write_batch()

    def write_batch(self) -> None:
        ids, lengths = self._encoder.encode_documents(self._texts)
        controls = self._encoder.take_control_counts()
        self._counts.control_documents += controls.documents
        self._counts.control_tokens += controls.tokens
        kept = lengths[lengths > 0]
        self._counts.documents += kept.size
        self._counts.empty += lengths.size - kept.size
        self._counts.tokens += ids.size
        self._counts.text_bytes += sum(len(text.encode("utf-8")) for text in self._texts)
        self._ids.write(np.ascontiguousarray(ids).data)
        self._lengths.write(kept.astype("<i4").tobytes())
        self._texts, self._characters = [], 0

    def close(self) -> None:
        self._ids.close()
        self._lengths.close()


def run_chunks(chunks: Sequence[Chunk], job: Job, workers: int) -> Generator[ChunkResult, None, None]:
    """The result of every chunk, in the order in which they end; in this process when `workers` is 1.

    Raises:
        DataError: what a worker raised, or a worker that died, at once and with the chunk it was at.
    """
    workers = min(workers, len(chunks))
    if workers <= 1:
        for chunk in chunks:
            yield encode_chunk(chunk, job)
        return
    pool = _Pool()
    try:
        pool.start(job, workers)
        yield from pool.run(chunks)
    finally:
        pool.stop()


class _Pool:
    """Processes, each with a pipe; a process gets its next chunk when it has answered the last."""

    def __init__(self) -> None:
        self._processes: dict[Connection, BaseProcess] = {}
        self._busy: dict[Connection, Chunk] = {}

    def start(self, job: Job, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        for number in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, job), name=f"preprocess-{number}", daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process

    def run(self, chunks: Sequence[Chunk]) -> Iterator[ChunkResult]:
        waiting = iter(chunks)
        for connection in self._processes:
            self._hand_out(connection, next(waiting, None))
        while self._busy:
            for connection in wait(list(self._busy)):
                result = self._receive(connection)
                del self._busy[connection]
                self._hand_out(connection, next(waiting, None))
                yield result

    def _hand_out(self, connection: Connection, chunk: Chunk | None) -> None:
        if chunk is None:
            return
        self._busy[connection] = chunk
        try:
            connection.send(chunk)
        except OSError as error:
            raise self._death(connection) from error

    def _receive(self, connection: Connection) -> ChunkResult:
        # A pipe whose other end is gone counts as readable, so a worker that dies is noticed without a time limit.
        try:
            result = connection.recv()
        except (EOFError, OSError) as error:
            raise self._death(connection) from error
        if isinstance(result, str):
            raise DataError(result)
        return result

    def _death(self, connection: Connection) -> DataError:
        process, chunk = self._processes[connection], self._busy[connection]
        process.join(5)
        code = process.exitcode
        cause = f"status {code}" if code is None or code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"
        return DataError(
            f"A worker process died ({cause}) at bytes {chunk.start} to {chunk.end} of {chunk.file.path}. If the "
            f"machine ran out of memory (SIGKILL), use fewer --workers."
        )

    def stop(self) -> None:
        """End the workers; none outlives the run, whatever ended it."""
        for process in self._processes.values():
            process.terminate()
        for connection, process in self._processes.items():
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()


def _serve(connection: Connection, job: Job) -> None:
    """A worker's life: answer chunks until the parent is gone. An answer that is a string is an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        try:
            chunk = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer: ChunkResult | str = encode_chunk(chunk, job)
        except MixtralError as error:
            answer = str(error)
        except Exception:  # noqa: BLE001 - the parent must hear of anything, or it would wait for ever
            answer = f"A worker failed at {chunk.file.path}:\n{traceback.format_exc()}"
        try:
            connection.send(answer)
        except OSError:
            return
