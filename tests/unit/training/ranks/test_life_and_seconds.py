"""A rank that stands still is named and ends the others; a slow one is named and does not."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from helpers.events import until
from helpers.ranks import run_ranks
from torch.distributed import HashStore

from megatron_mixtral.training.ranks import RankSeconds, SignsOfLife

LIMIT = 4.0  # seconds without a sign of life


@pytest.fixture
def stopped() -> Any:
    """A process that was stopped, as a rank may be."""
    program = ("import faulthandler, signal, time; faulthandler.register(signal.SIGUSR2); print('up', flush=True)\n"
               "def stands_here(): time.sleep(600)\nstands_here()")
    process = subprocess.Popen([sys.executable, "-c", program], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout.readline() == "up\n"
    os.kill(process.pid, signal.SIGSTOP)
    yield process
    process.kill()
    process.communicate()


def test_a_rank_without_signs_of_life_is_named_by_all_and_shows_its_stack(stopped, capfd) -> None:
    store, ended = HashStore(), []
    store.set("life/who/2", json.dumps([socket.gethostname(), stopped.pid]))
    store.set("life/2", "9 17")
    ranks = [SignsOfLife(rank, 3, LIMIT, end=lambda rank=rank: ended.append(rank)) for rank in (0, 1)]
    for rank in ranks:
        rank.after_step(lambda: store)
    until(lambda: sorted(ended) == [0, 1], "for both to end")
    for rank in ranks:
        rank._over.set()
    said = capfd.readouterr().err
    sentence = (f"rank 2 on {socket.gethostname()} (process {stopped.pid}) has given no sign of life for 4 s, the last "
                "after step 17: it was stopped, or its node stands still")
    assert said.count(sentence) >= 2 and "test_a_rank_without_signs_of_life" in said, "their own stacks"
    lines = iter(stopped.stderr.readline, "")
    assert any("stands_here" in line for line in lines), "the stack of the rank that was stopped"


def test_ranks_that_end_or_are_busy_are_not_missed() -> None:
    store, ended = HashStore(), []
    first, second = (SignsOfLife(rank, 2, 0.5, end=lambda: ended.append("early")) for rank in (0, 1))
    with first:
        with second:
            for rank in (first, second):
                rank.after_step(lambda: store)
            until(lambda: store.check(["life/0", "life/1"]))
        assert store.get("life/1") == b"ended" and not any(one.is_alive() for one in second._threads)
        until(lambda: first._looks > 25 or ended, "for the first to look on and on")
    assert ended == [] and store.get("life/0") == b"ended"


def test_the_process_that_keeps_the_store_may_be_the_one(capfd) -> None:
    class Silent:
        def set(self, *_: Any) -> None:
            threading.Event().wait(600)

    ended: list[int] = []
    rank = SignsOfLife(1, 2, 0.2, {"MASTER_ADDR": "node0"}, end=lambda: ended.append(1))
    rank._store = Silent()
    rank._watch_the_store()
    assert ended == [1] and "rank 0 on node0, which keeps the store" in capfd.readouterr().err


def test_one_rank_or_none_to_watch_starts_no_thread() -> None:
    for signs in (SignsOfLife(0, 1, 300.0), SignsOfLife(0, 8, 0.0)):
        with signs:
            signs.after_step(lambda: pytest.fail("a store was asked for"))


def _seconds(rank: int) -> list[dict[str, Any]]:
    """Three steps, of which the second is measured; rank 1 is slow, and rank 0 waits for it."""
    import megatron_mixtral.runtime as runtime

    seconds, found = RankSeconds(2, runtime.ready().waits(), "cpu"), []
    for step in (1, 2, 3):
        for _ in range(2):
            seconds.begin()
            time.sleep(0.5 * rank)
            torch.distributed.all_reduce(torch.ones(1))
        found.append(seconds.collect(step))
    return found


def test_the_slow_rank_has_work_and_the_others_wait() -> None:
    for first, second, third in run_ranks(2, _seconds):
        assert first == third == {}
        (own, slow), (waited, _) = second["rank_work_seconds"], second["rank_wait_seconds"]
        assert slow >= 1.0 and waited >= 0.5 and own < slow
        assert (second["slowest_rank"], second["slowest_node"]) == (1, socket.gethostname())
