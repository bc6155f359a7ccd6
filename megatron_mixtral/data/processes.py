"""Worker processes, and the parent's side of talking to them.

A task is a `Chunk`; its answer is the account of a few numbers that `workers.py` makes. Workers are forked where this
process has one thread, which takes milliseconds and shares what is loaded; otherwise (a library has started threads,
or another system) they are started fresh, so that no lock of a thread can be caught half-way in them.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Generator, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from megatron_mixtral.data.corpus.files import Chunk
from megatron_mixtral.data.preprocess.workers import ChunkEncoder, ChunkResult, Job
from megatron_mixtral.errors import DataError, MixtralError


def run_chunks(chunks: Sequence[Chunk], job: Job, workers: int) -> Generator[tuple[Chunk, ChunkResult], None, None]:
    """The result of every chunk, in the order in which they end; in this process when `workers` is 1.

    Raises:
        MixtralError: what a worker raised, or a worker that died, at once and with the chunk it was at.
    """
    workers = min(workers, len(chunks))
    if workers <= 1:
        encoder = ChunkEncoder(job) if chunks else None
        for chunk in chunks:
            yield chunk, encoder.encode(chunk)
        return
    pool = _Pool()
    try:
        pool.start(job, workers)
        yield from pool.run(chunks)
    finally:
        pool.stop()


def start_method() -> str:
    """`fork` for a process of one thread on Linux, else `spawn`."""
    try:
        alone = sys.platform == "linux" and len(os.listdir("/proc/self/task")) == 1
    except OSError:
        alone = False
    return "fork" if alone else "spawn"


class _Pool:
    """Processes, each with a pipe; a process gets its next chunk when it has answered the last."""

    def __init__(self) -> None:
        self._processes: dict[Connection, BaseProcess] = {}
        self._busy: dict[Connection, Chunk] = {}

    def start(self, job: Job, workers: int) -> None:
        method = start_method()
        context = multiprocessing.get_context(method)
        for number in range(workers):
            ours, theirs = context.Pipe()
            # A forked child has the job already, and the parent's ends of all pipes made so far: it must close those,
            # or it would not see the parent go. A fresh one is sent the job: as an argument it would make `start` wait
            # for ever where the child dies before it reads (it is larger than a pipe holds).
            inherited = (job, (*self._processes, ours)) if method == "fork" else (None, ())
            process = context.Process(
                target=_serve, args=(theirs, *inherited), name=f"preprocess-{number}", daemon=True
            )
            process.start()
            theirs.close()
            self._processes[ours] = process
        if method == "spawn":
            for connection in self._processes:  # they start side by side
                self._send(connection, job)

    def run(self, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, ChunkResult]]:
        waiting = iter(chunks)
        for connection in self._processes:
            self._hand_out(connection, next(waiting, None))
        while self._busy:
            for connection in wait(list(self._busy)):
                result = self._receive(connection)
                chunk = self._busy.pop(connection)
                self._hand_out(connection, next(waiting, None))
                yield chunk, result

    def _hand_out(self, connection: Connection, chunk: Chunk | None) -> None:
        if chunk is None:
            return
        self._busy[connection] = chunk
        self._send(connection, chunk)

    def _send(self, connection: Connection, what: Chunk | Job) -> None:
        try:
            connection.send(what)
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
        process, chunk = self._processes[connection], self._busy.get(connection)
        process.join(5)
        code = process.exitcode
        cause = f"status {code}" if code is None or code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"
        place = f"at {chunk.start} to {chunk.end} of {chunk.file.path}" if chunk else "when it started"
        return DataError(
            f"A worker process died ({cause}) {place}. If the machine ran out of memory (SIGKILL), use fewer --workers."
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


def _serve(connection: Connection, job: Job | None, others: Sequence[Connection]) -> None:
    """A worker's life: answer chunks until the parent is gone. An answer that is a string is an error.

    Without a `job` the parent sends it first; `others` are pipes that are not for this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:
        other.close()
    encoder = None
    while True:
        try:
            job = job or connection.recv()
            chunk = connection.recv()
        except (EOFError, OSError):
            return
        try:
            encoder = encoder or ChunkEncoder(job)
            answer: ChunkResult | str = encoder.encode(chunk)
        except MixtralError as error:
            answer = str(error)
        except OSError as error:
            answer = f"A worker cannot write in {job.scratch}: {error}."
        except Exception:  # noqa: BLE001 - the parent must hear of anything, or it would wait for ever
            answer = f"A worker failed at {chunk.file.path}:\n{traceback.format_exc()}"
        try:
            connection.send(answer)
        except OSError:
            return
