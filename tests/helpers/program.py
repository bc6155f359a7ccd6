"""Run the training program on several ranks as a user's torchrun would, without paying its imports each time.

Every run is a set of fresh processes, forked from the server of `ranks.py` that has torch and the engine imported, so
the engine's global state is that of a new program.
"""

import faulthandler
import importlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.events import HANG
from helpers.ports import free_port
from helpers.ranks import prepare_fork_server
from megatron_mixtral import __main__ as commands

IDLE, SPINNING = 1.0, 2.0  # seconds without any thread that could run; seconds of processor time


@dataclass(frozen=True)
class Halt:
    """Where rank `rank` stands still for good, having made `folder/halted`: an event to wait for, after which the run
    can neither end nor make another step, however late the test is.
    """

    rank: int
    batch: int | None = None  # before its reader hands out this micro-batch, from 1; 0: before the program begins
    saving: int | None = None  # before this change, from 1, to a checkpoint that is being written


@dataclass
class Outcome:
    """How a run ended: each rank's exit code and output (its screen, and then its log file where there is one), the
    figures of its steps by iteration, and for each data-parallel rank the indices of the samples that it
    read, in order.
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
                 module: str = "", halt: Halt | None = None, command: str = "pretrain") -> None:
        """Start `module.main(ARGV)`, or else a command, on `world` ranks; each first calls `prepare`, which can be
        pickled.
        """
        folder.mkdir(parents=True, exist_ok=True)
        context = prepare_fork_server()
        port = free_port()
        self.folder, self.metrics = folder, folder / "metrics.jsonl"
        for file in (self.metrics, folder / "halted", *folder.glob("*.samples")):
            file.unlink(missing_ok=True)
        self._saved = Path(argv[argv.index("--save") + 1]) / "logs" if "--save" in argv else folder / "no logs"
        self._before = set(self._saved.rglob("*.log"))
        argv = [*argv, "--metrics-file", str(self.metrics)]
        self.logs = [folder / f"rank{rank}.log" for rank in range(world)]
        self.ranks = [context.Process(target=_rank, args=(rank, world, port, module, argv, str(self.logs[rank]),
                                                           prepare, halt, command), daemon=False)
                      for rank in range(world)]
        for process in self.ranks:
            process.start()

    def said(self, rank: int) -> str:
        """What a rank has printed so far: on the screen, and then all of it in the log files of this start."""
        names = (f"rank_{rank}.log", f"rank_{rank}.2.log",
                 f"starting-{socket.gethostname()}-{self.ranks[rank].pid}.log")
        files = [file for name in names for file in sorted(self._saved.rglob(name)) if file not in self._before]
        screen = self.logs[rank].read_text().replace("\n  ", " ")  # where sentences are wrapped
        return screen + "".join(file.read_text() for file in files)

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.ranks)

    def figures(self) -> dict[int, dict[str, Any]]:
        """The figures of the steps so far."""
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        return {figures["iteration"]: figures for figures in map(json.loads, lines)}

    def _kill(self) -> None:
        for process in self.ranks:
            process.kill()

    def signal(self, number: int) -> None:
        """Send a signal to every rank."""
        for process in self.ranks:
            os.kill(process.pid, number)

    def halted(self) -> bool:
        return (self.folder / "halted").exists()

    def finish(self) -> Outcome:
        """Wait for the end. As torchrun does: one rank that fails ends the others, which may wait for it for ever; but
        not before they have nothing left to do, so that each comes to its own sentence however slow the machine is.
        """
        end, idle, used = time.monotonic() + HANG, 0, {}
        while self.alive():
            time.sleep(0.05)
            if any(process.exitcode not in (None, 0) for process in self.ranks):
                states = [_state(process.pid) for process in self.ranks if process.is_alive()]
                idle = 0 if any(runs for runs, _ in states) else idle + 1
                spent = sum(seconds for _, seconds in states)
                used.setdefault(len(states), spent)
                if idle * 0.05 > IDLE or spent - used[len(states)] > SPINNING * len(states):
                    self._kill()
            if time.monotonic() > end:
                self._kill()
        for process in self.ranks:
            process.join()
        read = {int(file.stem): [int(index) for index in file.read_text().split()]
                for file in self.folder.glob("*.samples")}
        return Outcome([process.exitcode for process in self.ranks],
                       [self.said(rank) for rank in range(len(self.ranks))], self.figures(), read)


def _state(pid: int) -> tuple[bool, float]:
    """Whether a thread of the process could run, and the processor time that all of them used, seconds."""
    runs, ticks = False, 0
    for task in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            fields = task.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it ended
            continue
        runs |= fields[0] in "RD"
        ticks += int(fields[11]) + int(fields[12])
    return runs, ticks / os.sysconf("SC_CLK_TCK")


def pretrain(world: int, argv: list[str], folder: Path,
             prepare: Callable[[], None] | None = None, command: str = "pretrain") -> Outcome:
    """Run `megatron-mixtral pretrain ARGV`, or another command of training, on `world` ranks to its end; logs, metrics
    and the samples that each rank read go below `folder`.
    """
    return Running(world, argv, folder, prepare, command=command).finish()


def _record_samples(folder: Path, halt_at: int | None) -> None:
    """Have the engine's sampler note what it hands out; ranks that read the same data write the same file."""
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    indices = MegatronPretrainingSampler.__iter__

    def noted(self: Any) -> Any:
        handed_out: list[int] = []
        for number, batch in enumerate(indices(self), 1):
            if number == halt_at:
                _stand_still(folder)
            handed_out += batch
            draft = folder / f"{self.data_parallel_rank}.samples.{os.getpid()}"
            draft.write_text(" ".join(map(str, handed_out)))
            draft.rename(folder / f"{self.data_parallel_rank}.samples")
            yield batch

    MegatronPretrainingSampler.__iter__ = noted


def _stand_still(folder: Path) -> None:
    (folder / "halted").touch()
    while True:
        time.sleep(HANG)


def _halt_in_a_save(folder: Path, number: int) -> None:
    """At the Nth file or folder that is made, renamed or removed below a checkpoint that is being written. The rank may
    have a process of its own for that, which stands still as long as the rank lives.
    """
    rank, changes = os.getpid(), itertools.count(1)

    def watch(event: str, words: tuple) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and "/.saving-" in str(words[0]) \
                and not (event == "open" and words[1] in ("r", "rb")) and next(changes) == number:
            if os.getpid() == rank:
                _stand_still(folder)
            (folder / "halted").touch()
            while _lives(rank):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def _rank(rank: int, world: int, port: int, module: str, argv: list[str], log: str,
          prepare: Callable[[], None] | None, halt: Halt | None, command: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    faulthandler.enable()
    halt = halt if halt is not None and halt.rank == rank else Halt(rank)
    _record_samples(Path(log).parent, halt.batch)
    if halt.saving is not None:
        _halt_in_a_save(Path(log).parent, halt.saving)
    if halt.batch == 0:
        _stand_still(Path(log).parent)
    if prepare is not None:
        prepare()
    try:
        code = importlib.import_module(module).main(argv) if module else commands.run(command, argv)
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
