"""Distributed tests as ordinary functions: `run_ranks(world, function, *args)` runs it on every rank.

A fork server imports torch and the engine once; the ranks of a call are forked from it, in a fraction of a second, and
end with it. They are not kept for the next call: the engine's process groups cannot be closed completely, and gloo's
threads of a group whose peers are gone spin, which starves everything else on a small machine.
"""

import multiprocessing
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from helpers.events import HANG

ROOT = Path(__file__).resolve().parents[2]


class RankError(AssertionError):
    """A rank failed: its traceback."""


def prepare_fork_server() -> Any:
    """The multiprocessing context whose server has torch and the engine imported."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "RANKS_ON" not in os.environ:
        import torch

        os.environ["RANKS_ON"] = "cuda" if torch.cuda.is_available() else "cpu"
    for folder in (str(ROOT), str(ROOT / "tests")):
        if folder not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.preload"])
    return context


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = HANG) -> list[Any]:
    """`function(rank, *args)` on `world` ranks with torch.distributed initialised; the results in rank order.

    `function` is a module-level function and its arguments and results are picklable. The first rank that fails ends
    the others, which may wait for it in a collective for ever: `RankError` with its traceback.
    """
    context = prepare_fork_server()
    store = tempfile.mkdtemp(prefix="ranks-")
    ranks, connections = [], []
    try:
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(rank, world, store, theirs, function, args), daemon=True)
            process.start()
            theirs.close()
            ranks.append(process)
            connections.append(ours)
        return _collect(function.__name__, connections, timeout)
    finally:
        for process in ranks:
            process.kill()
            process.join()
        shutil.rmtree(store, ignore_errors=True)


def _collect(name: str, connections: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(enumerate(connections))
    while waiting:
        ready = wait(list(waiting.values()), timeout)
        if not ready:
            raise RankError(f"{name}: ranks {sorted(waiting)} gave no answer in {timeout} s")
        for rank in [rank for rank, connection in waiting.items() if connection in ready]:
            try:
                ok, value = waiting.pop(rank).recv()
            except EOFError:
                ok, value = False, f"rank {rank} died"
            if not ok:
                raise RankError(f"{name} on rank {rank} of {len(connections)}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(connections))]


def _rank(rank: int, world: int, store: str, connection: Connection, function: Callable[..., Any],
          args: tuple) -> None:
    """A rank's life: join the group, run the function, send its result, wait to be ended."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    try:
        import torch

        import megatron_mixtral.runtime

        backend = megatron_mixtral.runtime.ready(training=True)
        if backend.device == "cuda":
            torch.cuda.set_device(rank)
        torch.set_num_threads(1)
        torch.distributed.init_process_group(backend.collectives, init_method=f"file://{store}/store", rank=rank,
                                             world_size=world, timeout=timedelta(seconds=HANG))
        answer = (True, function(rank, *args))
    except BaseException:  # noqa: BLE001 - whatever a test's body raises belongs to the test
        answer = (False, traceback.format_exc())
    connection.send(answer)
    connection.poll(HANG)  # the others may still need this rank's end of a connection
    os._exit(0)


def undo_ready() -> None:
    """Put everything back as `runtime.ready()` found it in this process."""
    import megatron_mixtral.runtime.environment as environment

    if environment._ready_core.cache_info().currsize:
        environment._ready_core()[1].undo()
    environment._ready_core.cache_clear()
    environment._ready_training.cache_clear()
