"""A rank that stands still ends the run, with its name and everybody's stack, in place of a wait without an end.

From the end of the first step each rank counts up a number in the store of the process group, from a thread of its own,
and looks at the next rank's. Where that has not moved for the time that is set, it says so in the store. Every rank
that reads it there says it in its log, waits until the others have, and ends: the first that ended would take the
connections of the others along, who would know of no more than that. Time is counted in looks: whoever was stopped
himself, or starved, has not looked. The process that keeps the store may be what stands still; then no look comes back,
which a second thread sees.

What makes the next rank's thread stop is a stopped or frozen process or a lost node. A rank that computes without an
end goes on counting: for that there is the timeout of collectives, `--distributed-timeout-minutes`.
"""

import faulthandler
import itertools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from megatron_mixtral.runtime import launch

logger = logging.getLogger(__name__)

LOOKS = 10  # in the time that is set
PATIENCE = 3  # looks that a rank waits for the others, once it has said which one stands still
_STILL, _SAID, _ENDED = "life/still", "life/said", b"ended"
STACKS = signal.SIGUSR2  # has a rank write the stacks of its threads into its log


class SignsOfLife:
    """A context in which a rank runs. `limit` is in seconds; 0 watches nothing."""

    def __init__(self, rank: int, world: int, limit: float, environ: Mapping[str, str] = {},  # noqa: B006 - only read
                 end: Callable[[], None] = lambda: os._exit(1)) -> None:
        """`environ` is the process's; `end` is how it ends when a rank stands still."""
        self._environ = environ
        self._rank, self._next, self._world, self._end = rank, (rank + 1) % world, world, end
        self._every = limit / LOOKS if world > 1 else 0.0
        self._limit, self._over = limit, threading.Event()
        self._looks, self._step = 0, 0
        self._store: Any = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "SignsOfLife":
        if self._every:
            with suppress(ValueError, AttributeError, OSError):  # not in the main thread, or a stderr without a file
                faulthandler.register(STACKS, file=sys.stderr, all_threads=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """The others look no longer for this one. Its threads end here, unless a store holds them that answers no more:
        one that is inside the store's code while the interpreter is taken down would abort the process. Whoever fails
        before he has looked says which rank stands still, too.
        """
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=5.0)
        if kind is not None and issubclass(kind, Exception) and not any(one.is_alive() for one in self._threads):
            with suppress(RuntimeError):  # the store went with another rank
                if self._store is not None and (said := self._read(_STILL)):
                    self._stop(*json.loads(said))
        if self._store is not None:
            with suppress(Exception):  # the store went with another rank
                self._store.set(f"life/{self._rank}", _ENDED)

    def after_step(self, store: Callable[[], Any]) -> None:
        """Called after each step; the first begins the watch. `store` gives one that this thread alone uses."""
        self._step += 1
        if self._store is None and self._every:
            self._store = store()
            self._store.set(f"life/who/{self._rank}", json.dumps([socket.gethostname(), os.getpid()]))
            self._store.set(f"life/{self._rank}", f"0 {self._step}")
            for body in (self._beat, self._watch_the_store):
                self._threads.append(threading.Thread(target=body, name="signs of life", daemon=True))
                self._threads[-1].start()

    def _beat(self) -> None:
        seen, unchanged = b"", 0
        for count in itertools.count(1):
            if self._over.wait(self._every):
                return
            try:
                self._store.set(f"life/{self._rank}", f"{count} {self._step}")
                now, said = self._read(f"life/{self._next}"), self._read(_STILL)
                still = json.loads(said) if said else None
                unchanged = 0 if now == _ENDED or now != seen else unchanged + 1
                if still is None and unchanged >= LOOKS:
                    who = json.loads(self._read(f"life/who/{self._next}") or b'["an unknown host", 0]')
                    still = [self._next, *who, seen.decode() or "0 0"]
                    self._store.set(_STILL, json.dumps(still))
            except RuntimeError:  # the store went with another rank, which ends this one too
                return
            if still is not None and not self._over.is_set():
                return self._stop(*still)
            seen, self._looks = now, count

    def _read(self, key: str) -> bytes:
        """What the store has under a key; nothing where it has none, for which a plain read would wait."""
        return self._store.get(key) if self._store.check([key]) else b""

    def _watch_the_store(self) -> None:
        seen, unchanged = -1, 0
        while not self._over.wait(self._every):
            unchanged = unchanged + 1 if self._looks == seen else 0
            seen = self._looks
            if unchanged > 2 * LOOKS:  # the others' word first
                by_torchrun = self._environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
                keeper = "torchrun" if by_torchrun else "rank 0"
                self._say(f"{keeper} on {self._environ.get('MASTER_ADDR')}, "
                          f"which keeps the store of the ranks, has not answered for {2 * self._limit:g} s")
                return self._end()

    def _stop(self, rank: int, host: str, process: int, last: str) -> None:
        step = last.partition(" ")[2]
        self._say(f"rank {rank} on {host} (process {process}) has given no sign of life for {self._limit:g} s, the "
                  f"last after step {step}: it was stopped, or its node stands still")
        with suppress(RuntimeError):  # the store went with a rank that has waited long enough
            said, left = self._store.add(_SAID, 1), LOOKS * PATIENCE
            while said < self._world - 1 and (left := left - 1):
                time.sleep(self._every / LOOKS)
                said = self._store.add(_SAID, 0)
        if host == socket.gethostname() and process != os.getpid():
            with suppress(OSError):  # so that its log has its stack; it can go nowhere without the others
                os.kill(process, STACKS)
                os.kill(process, signal.SIGCONT)
        self._end()

    def _say(self, sentence: str) -> None:
        sys.stderr.write(f"{sentence}. The stacks of this rank's threads:\n")
        with suppress(ValueError, AttributeError, OSError):
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if launch.speaks(self._environ, sentence):
            logger.error("%s. The run ends here; each rank's log has its stacks. The same command goes on from the "
                         "last checkpoint", sentence)
        sys.stderr.flush()
