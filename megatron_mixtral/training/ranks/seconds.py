"""Each rank's own work in a step and its waits for others, every so many steps, and which rank works longest.

All ranks end a step together, so a slow one shows in no step time but in what the others wait. The rank that waits
least is the one that the others wait for: a slow device, a slow reader, a busy node.
"""

import socket
import time
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist


class RankSeconds:
    """One on every rank. `waits` is a `runtime` counter of the seconds in collectives, which is on in such steps alone:
    on a GPU it costs two events a collective.
    """

    def __init__(self, interval: int, waits: Any, device: str) -> None:
        """`interval` 0: never."""
        self._interval, self._waits, self._device = interval, waits, device
        self._began: float | None = None
        waits.counting = interval > 0

    def begin(self) -> None:
        """Called at every micro-batch; the first is the beginning of a step, behind saving and validation."""
        if self._began is None:
            self._began = time.perf_counter()
            self._waits.take()

    def collect(self, iteration: int) -> dict[str, Any]:
        """Called on every rank at the end of a step: what the metrics of the step have of it, nothing in most steps.
        Seconds of each rank in the order of the ranks.
        """
        began, self._began = self._began, None
        due = self._interval > 0 and iteration % self._interval == 0
        self._waits.counting = self._interval > 0 and (iteration + 1) % self._interval == 0
        if not due or began is None:
            return {}
        waited = self._waits.take()
        own = torch.tensor([time.perf_counter() - began - waited, waited], dtype=torch.float64, device=self._device)
        both = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(both, own)
        work, waits = (torch.stack(both).T * 1e4).round().div(1e4).tolist()
        slowest = max(range(len(work)), key=work.__getitem__)
        return {"rank_work_seconds": work, "rank_wait_seconds": waits, "slowest_rank": slowest,
                "slowest_node": self._nodes[slowest]}

    @cached_property
    def _nodes(self) -> list[str]:
        """The host of each rank."""
        names: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(names, socket.gethostname())
        return names
