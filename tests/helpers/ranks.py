"""Distributed tests as ordinary functions: `run_ranks(world, function, *args)` runs it on every rank.

A fork server imports torch and the engine once. Pools of ranks, one per world size, are forked from it on demand and
kept. Process groups live for one call: gloo's threads of groups that are merely forgotten spin on closed sockets and
starve everything else. After an error the pool is killed, since the other ranks may wait in a collective for ever, and
the next call forks a new one.
"""

import atexit
import itertools
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 240.0  # seconds for one call; the slowest takes a few

_pools: dict[int, "_Pool"] = {}


class RankError(AssertionError):
    """A rank failed: its traceback."""


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """`function(rank, *args)` on `world` ranks with torch.distributed initialised; the results in rank order.

    `function` is a module-level function and its arguments and results are picklable.
    """
    if world not in _pools:
        _pools[world] = _Pool(world)
    pool = _pools[world]
    try:
        return pool.call(function, args, timeout)
    except BaseException:
        del _pools[world]
        pool.kill()
        raise


def prepare_fork_server() -> Any:
    """The multiprocessing context whose server has torch and the engine imported."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for folder in (str(ROOT), str(ROOT / "tests")):
        if folder not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.preload"])
    return context


class _Pool:
    def __init__(self, world: int) -> None:
        context = prepare_fork_server()
        self._store = tempfile.mkdtemp(prefix="ranks-")
        self._ranks, self._connections = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, self._store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append(process)
            self._connections.append(ours)

    def call(self, function: Callable[..., Any], args: tuple, timeout: float) -> list[Any]:
        for connection in self._connections:
            connection.send((function, args))
        results: dict[int, Any] = {}
        waiting = dict(enumerate(self._connections))
        while waiting:
            ready = wait(list(waiting.values()), timeout)
            if not ready:
                raise RankError(f"{function.__name__}: ranks {sorted(waiting)} gave no answer in {timeout} s")
            for rank in [rank for rank, connection in waiting.items() if connection in ready]:
                ok, value = _receive(waiting.pop(rank), rank)
                if not ok:
                    raise RankError(f"{function.__name__} on rank {rank} of {len(self._ranks)}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(len(self._ranks))]

    def kill(self) -> None:
        for process in self._ranks:
            process.kill()
            process.join()


def _receive(connection: Connection, rank: int) -> tuple[bool, Any]:
    try:
        return connection.recv()
    except EOFError:
        return False, f"rank {rank} died"


def _serve(rank: int, world: int, store: str, connection: Connection) -> None:
    """A rank's loop: receive a function, run it, send its result."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    import torch

    import megatron_mixtral.runtime

    backend = megatron_mixtral.runtime.ready(training=True)
    if backend.device == "cuda":
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    for call in itertools.count():
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            torch.distributed.init_process_group(backend.collectives, init_method=f"file://{store}/{call}", rank=rank,
                                                 world_size=world, timeout=timedelta(seconds=120))
            answer = (True, function(rank, *args))
            _end_groups()
        except BaseException:  # noqa: BLE001 - whatever a test's body raises belongs to the test
            answer = (False, traceback.format_exc())
        connection.send(answer)


def _end_groups() -> None:
    """Close every process group, with all ranks still there."""
    import torch
    from megatron.core import parallel_state

    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@atexit.register
def _close() -> None:
    for pool in _pools.values():
        pool.kill()
