"""The one pool of worker processes of preprocessing, and the parent's side of talking to them.

A worker has a `Work`: an object whose `run` answers task after task. Workers are forked where this process has one
thread, which takes milliseconds and shares what is loaded; otherwise (a library has started threads, or another system)
they are started fresh, so that no lock of a thread can be caught half-way in them. They die with their parent.
"""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from megatron_mixtral.data.scratch import FULL
from megatron_mixtral.errors import DataError, MixtralError


class Work(Protocol):
    """What workers do. It can be pickled, so that a fresh process can be sent it."""

    def run(self, task: Any) -> Any:
        """The answer to one task. Raises `MixtralError` for what ends the run."""

    def place(self, task: Any) -> str:
        """Where in the input a task lies, for messages."""


def run_tasks(
    tasks: Iterable[Any], work: Work, workers: int, ahead: int | None = None
) -> Generator[tuple[int, Any], None, None]:
    """(number of the task, answer), in the order in which tasks end; in this process when `workers` is 1.

    With `ahead` no task is begun before the one that many places earlier has ended.

    Raises:
        OSError: a disk is full.
        MixtralError: what a worker raised, or a worker that died, at once and with the place it was at.
    """
    if workers <= 1:
        for number, task in enumerate(tasks):
            yield number, work.run(task)
        return
    pool = _Pool(work)
    try:
        pool.start(workers)
        yield from pool.run(tasks, ahead)
    finally:
        pool.stop()


def run_in_order(tasks: Iterable[Any], work: Work, workers: int, ahead: int) -> Generator[Any, None, None]:
    """The answers to all tasks, in the order of these. Otherwise as `run_tasks`."""
    ready: dict[int, Any] = {}
    following = 0
    with closing(run_tasks(tasks, work, workers, ahead)) as answers:
        for number, answer in answers:
            ready[number] = answer
            while following in ready:
                yield ready.pop(following)
                following += 1


def start_method() -> str:
    """`fork` for a process of one thread on Linux, else `spawn`."""
    try:
        alone = sys.platform == "linux" and len(os.listdir("/proc/self/task")) == 1
    except OSError:
        alone = False
    return "fork" if alone else "spawn"


class _Pool:
    """Processes, each with a pipe; a process gets its next task when it has answered the last."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._processes: dict[Connection, BaseProcess] = {}
        self._busy: dict[Connection, tuple[int, Any]] = {}  # the number of the task, and the task
        self._handed_out = 0

    def start(self, workers: int) -> None:
        method = start_method()
        context = multiprocessing.get_context(method)
        for number in range(workers):
            ours, theirs = context.Pipe()
            # A forked child has the work already, and the parent's ends of all pipes made so far: it must close those,
            # or it would not see the parent go. A fresh one is sent the work: as an argument it would make `start` wait
            # for ever where the child dies before it reads (it is larger than a pipe holds).
            inherited = (self._work, (*self._processes, ours)) if method == "fork" else (None, ())
            process = context.Process(
                target=_serve, args=(theirs, *inherited), name=f"preprocess-{number}", daemon=True
            )
            process.start()
            theirs.close()
            self._processes[ours] = process
        if method == "spawn":
            for connection in self._processes:  # they start side by side
                self._send(connection, self._work)
            for connection in self._processes:  # one that dies before is not said to have died at a task
                self._receive(connection)

    def run(self, tasks: Iterable[Any], ahead: int | None) -> Iterator[tuple[int, Any]]:
        waiting = enumerate(tasks)
        idle = list(self._processes)
        self._hand_out(idle, waiting, ahead)
        while self._busy:
            ended = []
            for connection in wait(list(self._busy)):
                answer = self._receive(connection)
                number, _ = self._busy.pop(connection)
                ended.append((number, answer))
                idle.append(connection)
            # Handed out before these answers are looked at, so that no worker waits for that.
            self._hand_out(idle, waiting, ahead)
            yield from ended

    def _hand_out(self, idle: list[Connection], waiting: Iterator[tuple[int, Any]], ahead: int | None) -> None:
        """Give tasks to the idle processes, which leave the list."""
        while idle and (ahead is None or not self._busy or self._handed_out < self._oldest() + ahead):
            numbered = next(waiting, None)
            if numbered is None:
                return
            connection = idle.pop()
            self._busy[connection] = numbered
            self._handed_out += 1
            self._send(connection, numbered[1])

    def _oldest(self) -> int:
        return min(number for number, _ in self._busy.values())

    def _send(self, connection: Connection, what: Any) -> None:
        try:
            connection.send(what)
        except OSError as error:
            raise self._death(connection) from error

    def _receive(self, connection: Connection) -> Any:
        # A pipe whose other end is gone counts as readable, so a worker that dies is noticed without a time limit.
        try:
            failed, answer = connection.recv()
        except (EOFError, OSError) as error:
            raise self._death(connection) from error
        if failed:
            raise answer if isinstance(answer, OSError) else DataError(answer)
        return answer

    def _death(self, connection: Connection) -> DataError:
        process, busy = self._processes[connection], self._busy.get(connection)
        process.join(5)
        code = process.exitcode
        cause = f"status {code}" if code is None or code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"
        place = f"at {self._work.place(busy[1])}" if busy else "when it started"
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


def _serve(connection: Connection, work: Work | None, others: Sequence[Connection]) -> None:
    """A worker's life: answer tasks until the parent is gone. An answer is (failed, the answer or the error's text).
    Of a full disk it is the error itself.

    Without `work` the parent sends it first; `others` are pipes that are not for this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:
        other.close()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        if work is None:
            work = connection.recv()
            connection.send((False, "ready"))
        while True:
            connection.send(_answer(work, connection.recv()))
    except (EOFError, OSError):
        return


def _answer(work: Work, task: Any) -> tuple[bool, Any]:
    try:
        return False, work.run(task)
    except MixtralError as error:
        return True, str(error)
    except OSError as error:
        if error.errno in FULL:
            return True, error  # the parent knows which disk
        return True, f"A worker failed at {work.place(task)}: {error}."
    except Exception:  # noqa: BLE001 - the parent must hear of anything, or it would wait for ever
        return True, f"A worker failed at {work.place(task)}:\n{traceback.format_exc()}"


def _die_with_parent() -> None:
    """End this process when its parent has gone, even in the middle of a long task."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
