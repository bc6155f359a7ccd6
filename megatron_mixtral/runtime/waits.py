"""How long this process waits for others in collectives: the time inside `torch.distributed.Work.wait`.

Every collective that is not asynchronous ends in it, and so does every asynchronous one when it is needed. On a CPU it
blocks the process. On a GPU it returns at once and the stream waits, which events in front and behind measure; either
way the transfer itself is part of it.
"""

import time
from typing import Any

import torch
import torch.distributed as dist


class Waits:
    """Adds up while it is `counting`."""

    def __init__(self, on_gpu: bool) -> None:
        self.counting = False
        self._on_gpu, self._seconds = on_gpu, 0.0
        self._events: list[tuple[torch.Event, torch.Event]] = []

    def install(self) -> "Waits":
        """Stand in the place of torch's method, for the life of the process."""
        wait = dist.Work.wait

        def timed(work: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.counting:
                return wait(work, *args, **kwargs)
            began = self._now()
            try:
                return wait(work, *args, **kwargs)
            finally:
                self._add(began, self._now())

        dist.Work.wait = timed
        return self

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.Event("cuda", enable_timing=True)
        event.record()
        return event

    def _add(self, began: Any, ended: Any) -> None:
        if self._on_gpu:
            self._events.append((began, ended))
        else:
            self._seconds += ended - began

    def take(self) -> float:
        """The seconds since the last call. On a GPU it waits for the last of them."""
        for began, ended in self._events:
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1000
        seconds, self._seconds = self._seconds, 0.0
        self._events.clear()
        return seconds
