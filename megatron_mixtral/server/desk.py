"""Where requests wait for what the engine makes of them: between the web's thread and the one that steps.

Rank 0 has two threads. The main one steps the engine (`Desk.run`), since that is where its device and its process
groups are at home; the other one speaks HTTP. A request comes in by `submit`, on the web's event loop; its events go
out over a queue of that loop. Nothing that a client does, or fails to do, makes the engine wait.
"""

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_mixtral.errors import ConfigError, MixtralError
from megatron_mixtral.inference import Event, SamplingParams

if TYPE_CHECKING:
    from megatron_mixtral.inference import Engine

logger = logging.getLogger(__name__)

HEARTBEAT = 1.0  # seconds between two steps without work, by which the other ranks know that rank 0 is there
GRACE = 5.0  # seconds that what is running has to finish, once the end was asked for


class Closed(MixtralError):
    """The desk takes nothing, or cannot finish what it took: the server ends."""


class Full(MixtralError):
    """More would wait than may."""


class Ticket:
    """A request at the desk: some prompts, each with some continuations. `close()` it in any case, which frees the
    slots of those that have not ended.
    """

    def __init__(self, desk: "Desk", continuations: int) -> None:
        self._desk, self._continuations = desk, continuations
        self._loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event] | Closed] = asyncio.Queue()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(number of the prompt, event), as they come, until all continuations have ended. Raises `Closed`."""
        ended = 0
        while ended < self._continuations:
            news = await self._queue.get()
            if isinstance(news, Closed):
                raise news
            ended += news[1].finish_reason is not None
            yield news

    def put(self, news: tuple[int, Event] | Closed) -> None:
        """From any thread. A loop that has ended has no one who reads."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, news)
        except RuntimeError:
            logger.debug("nobody waits for %s any more", news)

    def close(self) -> None:
        """End what has not ended."""
        self._desk.cancel(self)


@dataclass
class _Open:
    """A prompt of a ticket that the engine has, and how many of its continuations have not ended."""

    ticket: Ticket
    prompt: int
    left: int


class Desk:
    """The engine's side of a server: `run` in the main thread, the rest from any."""

    def __init__(self, engine: "Engine", max_queue: int) -> None:
        """`max_queue` is the most continuations that may wait for a slot."""
        self.engine, self.max_queue = engine, max_queue
        self._open: dict[str, _Open] = {}
        self._numbers = itertools.count(1)
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._closed: Closed | None = None  # why nothing more is taken
        self._over = False  # whether the engine steps no more
        self._end: float | None = None  # when what is running has to have ended, time.monotonic()

    @property
    def closed(self) -> Closed | None:
        """Why the desk takes nothing more; None as long as it does."""
        return self._closed

    @property
    def ending(self) -> bool:
        """Whether `close` was called."""
        return self._end is not None

    def submit(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Ticket:
        """Take a request of some prompts, all or none. On an event loop. `Full`, `Closed`, and the engine's own
        `ConfigError` for a prompt that does not fit.
        """
        ticket = Ticket(self, len(prompts) * params.n)
        more, room = len(prompts) * params.n, self.engine.slots + self.max_queue
        if more > room:
            raise ConfigError(f"{len(prompts)} prompts x n {params.n} is {more} continuations, and this server takes "
                              f"{room}: {self.engine.slots} slots and {self.max_queue} that may wait (--max-queue)")
        with self._lock:
            if self._closed is not None:
                raise self._closed
            there = sum(one.left for one in self._open.values())
            if there + more > room:
                raise Full(f"{there} continuations are under way, and {more} more would be beyond {self.engine.slots} "
                           f"slots and the {self.max_queue} that may wait (--max-queue): ask again later.")
            taken: list[str] = []
            try:
                for number, prompt in enumerate(prompts):
                    name = f"request-{next(self._numbers)}"
                    self.engine.add(name, prompt, params)
                    self._open[name] = _Open(ticket, number, params.n)
                    taken.append(name)
            except MixtralError:
                for name in taken:
                    self.engine.cancel(name)
                raise
        self._wake.set()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End what a ticket has that has not ended."""
        with self._lock:
            names = [name for name, one in self._open.items() if one.ticket is ticket]
            for name in names if not self._over else []:
                self.engine.cancel(name)
        if names:
            self._wake.set()

    def close(self, grace: float = GRACE) -> None:
        """Take nothing more, and end when what was taken has ended, but not later than in so many seconds. For a
        handler of signals: it takes no lock, so the main thread may see it a heartbeat later.
        """
        self._end = min(self._end or float("inf"), time.monotonic() + grace)

    def run(self) -> None:
        """Step until `close`, then let the other ranks go. Raises what the engine does, having told who waits."""
        why = Closed("the server has ended")
        try:
            while self._end is None or (self.engine.has_work and time.monotonic() < self._end):
                if self._end is not None:
                    self._refuse(Closed("the server is ending, and takes no more requests"))
                if not self.engine.has_work:
                    self._wake.wait(HEARTBEAT)
                self._wake.clear()
                for event in self.engine.step():
                    self._hand_out(event)
            self._refuse(why)
            self.engine.close()
        except MixtralError as error:
            why = Closed(f"the server ends: {error}")
            raise
        finally:
            self._refuse(why)
            with self._lock:
                self._over = True
                for ticket in {id(one.ticket): one.ticket for one in self._open.values()}.values():
                    ticket.put(why)

    def _refuse(self, why: Closed) -> None:
        with self._lock:
            self._closed = self._closed or why

    def _hand_out(self, event: Event) -> None:
        with self._lock:
            one = self._open.get(event.request_id)
            if one is not None and event.finish_reason is not None:
                one.left -= 1
                if not one.left:
                    del self._open[event.request_id]
        if one is not None:
            one.ticket.put((one.prompt, event))
