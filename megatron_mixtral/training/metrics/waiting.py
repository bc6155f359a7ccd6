"""How long the steps of a rank waited for their data: the time in the reader, of training alone, not of validation.

Readers work ahead in processes of their own (`--num-workers`), so this is near 0 unless they cannot keep up.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any


class Waiting:
    """Adds up the seconds of a step; `hooks` takes them."""

    def __init__(self, begin: Callable[[], None] = lambda: None) -> None:
        """`begin` is called at every micro-batch of training."""
        self._seconds, self._begin = 0.0, begin

    def timed(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """The engine's forward step, whose reads are timed."""
        def step(data_iterator: Any, model: Any, **options: Any) -> Any:
            if model.training:
                self._begin()
            if data_iterator is not None and model.training:
                data_iterator = self._reading(data_iterator)
            return forward_step(data_iterator, model, **options)

        return step

    def _reading(self, data_iterator: Any) -> Iterator[Any]:
        while True:
            began = time.perf_counter()
            batch = next(data_iterator)
            self._seconds += time.perf_counter() - began
            yield batch

    def take(self) -> float:
        """The seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
