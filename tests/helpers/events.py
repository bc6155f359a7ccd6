"""Waiting in tests: for an event, never for a number of seconds, so that tests hold on a machine with other work.

`HANG` is no measure of anything: it ends a test that would otherwise wait for ever.
"""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

HANG = 600.0  # seconds


def until(condition: Callable[[], object], what: str = "") -> None:
    """Look again and again, until `condition` holds."""
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end, f"waited {HANG:.0f} s in vain {what}"
        time.sleep(0.01)


@contextmanager
def at_most_cpu_seconds(limit: float) -> Iterator[None]:
    """The processes that are started and ended in the block use no more processor time than this together.

    Other work beside it stretches the clock's seconds, and these hardly.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    yield
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < limit, f"{used:.2f} s of processor time, at most {limit} s"
