"""Run the training program on several ranks as a user's torchrun would, without paying its imports each time.

Every run is a set of fresh processes, forked from the server of `ranks.py` that has torch and the engine imported, so
the engine's global state is that of a new program.
"""

import faulthandler
import importlib
import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.ranks import prepare_fork_server
from megatron_mixtral import __main__ as commands


@dataclass
class Outcome:
    """How a run ended: each rank's exit code and output, the figures of its steps by iteration, and for each
    data-parallel rank the indices of the samples that it read, in order.
    """

    codes: list[int]
    logs: list[str]
    steps: dict[int, dict[str, Any]]
    read: dict[int, list[int]]

    def losses(self, *iterations: int) -> list[float]:
        return [self.steps[iteration]["lm_loss"] for iteration in iterations]

    def norms(self, *iterations: int) -> list[float]:
        return [self.steps[iteration]["grad_norm"] for iteration in iterations]


class Running:
    """A run that goes on in the background: its rank processes, and its end."""

    def __init__(self, world: int, argv: list[str], folder: Path, prepare: Callable[[], None] | None = None,
                 module: str = "") -> None:
        """Start `module.main(ARGV)`, or else the training program, on `world` ranks; each first calls `prepare`, which
        can be pickled.
        """
        folder.mkdir(parents=True, exist_ok=True)
        context = prepare_fork_server()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder, self.metrics = folder, folder / "metrics.jsonl"
        for file in (self.metrics, *folder.glob("*.samples")):
            file.unlink(missing_ok=True)
        argv = [*argv, "--metrics-file", str(self.metrics)]
        self.logs = [folder / f"rank{rank}.log" for rank in range(world)]
        self.ranks = [context.Process(target=_rank, args=(rank, world, port, module, argv, str(self.logs[rank]),
                                                           prepare), daemon=False) for rank in range(world)]
        for process in self.ranks:
            process.start()

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.ranks)

    def figures(self) -> dict[int, dict[str, Any]]:
        """The figures of the steps so far."""
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        return {figures["iteration"]: figures for figures in map(json.loads, lines)}

    def signal(self, number: int) -> None:
        """Send a signal to every rank."""
        for process in self.ranks:
            os.kill(process.pid, number)

    def finish(self, timeout: float = 300.0) -> Outcome:
        """Wait for the end. As torchrun does: one rank that fails ends the others, which may wait for it for ever."""
        deadline = time.monotonic() + timeout
        while self.alive():
            failed = any(process.exitcode not in (None, 0) for process in self.ranks)
            if failed or time.monotonic() > deadline:
                time.sleep(1.0 if failed else 0.0)
                for process in self.ranks:
                    process.kill()
            time.sleep(0.05)
        for process in self.ranks:
            process.join()
        read = {int(file.stem): [int(index) for index in file.read_text().split()]
                for file in self.folder.glob("*.samples")}
        return Outcome([process.exitcode for process in self.ranks], [log.read_text() for log in self.logs],
                       self.figures(), read)


def pretrain(world: int, argv: list[str], folder: Path, timeout: float = 300.0,
             prepare: Callable[[], None] | None = None) -> Outcome:
    """Run `tools/pretrain_mixtral.py ARGV` on `world` ranks to its end; logs, metrics and the samples that each rank
    read go below `folder`.
    """
    return Running(world, argv, folder, prepare).finish(timeout)


def _record_samples(folder: Path) -> None:
    """Have the engine's sampler note what it hands out; ranks that read the same data write the same file."""
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    indices = MegatronPretrainingSampler.__iter__

    def noted(self: Any) -> Any:
        handed_out: list[int] = []
        for batch in indices(self):
            handed_out += batch
            draft = folder / f"{self.data_parallel_rank}.samples.{os.getpid()}"
            draft.write_text(" ".join(map(str, handed_out)))
            draft.rename(folder / f"{self.data_parallel_rank}.samples")
            yield batch

    MegatronPretrainingSampler.__iter__ = noted


def _rank(rank: int, world: int, port: int, module: str, argv: list[str], log: str,
          prepare: Callable[[], None] | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    faulthandler.enable()
    _record_samples(Path(log).parent)
    if prepare is not None:
        prepare()
    try:
        code = importlib.import_module(module).main(argv) if module else commands.run("pretrain", argv)
    except SystemExit as end:  # the engine's way out at --exit-interval
        code = int(end.code or 0)
    except BaseException:  # noqa: BLE001 - as the interpreter would: print it, end with 1
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # The interpreter's own end would wait for the engine's helper processes and close gloo's threads one by one.
    multiprocessing.util._exit_function()
    os._exit(code)
