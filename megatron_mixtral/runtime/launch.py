"""Who starts the ranks of a run: torchrun, srun, or this program itself.

    torchrun ... pretrain ...     RANK, WORLD_SIZE, ...: this process is a rank
    srun ... pretrain ...         SLURM_PROCID, SLURM_NTASKS, ...: this process is a rank; rank 0 is on the first node
    pretrain ...                  one rank in this process, or torchrun with as many as the layout needs (--nproc)

`decide()` is a pure function of the environment and the layout; `take_part()` does what it says, for every command that
computes with a model. A variable of Slurm's is meant as in srun(1), OUTPUT ENVIRONMENT VARIABLES.
"""

import glob
import hashlib
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_mixtral.errors import ConfigError, MixtralError, RankLostError

logger = logging.getLogger(__name__)

_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # step ids from here on are the shells of sbatch and salloc, not tasks of srun
_LOWEST_PORT, _PORTS = 10_000, 20_000  # below those that Linux gives to clients


@dataclass(frozen=True)
class Launch:
    """How a process takes part in a run of `world` ranks."""

    world: int
    changed_by: str  # what the user changes to have another number of ranks
    variables: Mapping[str, str] = field(default_factory=dict)  # to set, so that this process is a rank or starts them
    starts: bool = False  # whether this process is to become torchrun
    planned: bool = False  # WORLD_SIZE alone: enough for a dry run or an index cache, not to train

    def to_train(self) -> Mapping[str, str]:
        """The variables to set. `ConfigError` where it is not said which rank this is."""
        if self.planned:
            raise ConfigError("WORLD_SIZE is set and RANK is not: unset it, and the program starts its ranks itself "
                              "(--nproc); or start it by torchrun or srun, which set both")
        return self.variables


def decide(environ: Mapping[str, str], needed: int, nproc: int | None = None) -> Launch:
    """Who starts the ranks. `needed` is the smallest number that holds the layout, `nproc` is `--nproc`. Whether the
    layout fits the number found is for the layout to say. `ConfigError` for variables that contradict one another.
    """
    if nproc is not None and nproc < 1:
        raise ConfigError(f"--nproc {nproc}: a run has at least one rank")
    if "RANK" in environ:
        world = _number(environ, "WORLD_SIZE")
        _check_nproc(nproc, _number(environ, "LOCAL_WORLD_SIZE", world), "torchrun")
        return Launch(world, "torchrun's --nproc-per-node x --nnodes")
    if "WORLD_SIZE" in environ:
        return Launch(_number(environ, "WORLD_SIZE"), "WORLD_SIZE", planned=True)
    if _is_task(environ):
        world = _tasks(environ)
        _check_nproc(nproc, world, "srun")
        return Launch(world, "srun's --ntasks", _rank_of_task(environ, world))
    world = nproc or needed
    if world > 1:
        # The package is found wherever the command was started; torchrun would set the second itself, with a warning.
        path = [str(Path(__file__).resolve().parents[2]), environ.get("PYTHONPATH", "")]
        variables = {"PYTHONPATH": ":".join(filter(None, path)), "OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS", "1")}
        return Launch(world, "--nproc", variables, starts=True)
    return Launch(1, "--nproc", {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})  # 0: any that is free


def take_part(found: Launch, command: str, argv: Sequence[str]) -> None:
    """Make this process a rank; or, where it is to start them, torchrun, and do not return. `command` and `argv` are
    those of this process. `ConfigError` where it is not said which rank this is. Imports no torch.
    """
    set_variables(found.to_train())
    if found.starts:
        logger.info("starting %d ranks on this machine", found.world)
        words = torchrun(found.world, argv, command)
        os.execv(words[0], words)  # signals reach torchrun, which passes them on


def set_variables(variables: Mapping[str, str]) -> None:
    """Set variables of this process's environment, which make it a rank. Call before `ready`; imports no torch."""
    os.environ.update(variables)


def torchrun(processes: int, argv: Sequence[str], command: str = "pretrain") -> list[str]:
    """The command that starts the program with this command line as so many ranks of this machine.

    torchrun would take `--nproc`, wherever it stands, for the beginning of a flag of its own, and SIGHUP from nohup.
    """
    words, kept = iter(argv), []
    for word in words:
        if word == "--nproc":
            next(words, None)
        elif not word.startswith("--nproc="):
            kept.append(word)
    signals = ["--signals-to-handle", "SIGTERM,SIGINT,SIGQUIT"]
    return [sys.executable, "-m", "megatron_mixtral.runtime.torchrun", "--standalone",
            "--nproc-per-node", str(processes), *(signals if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else ()),
            "-m", "megatron_mixtral", command, *kept]


def speaks(environ: Mapping[str, str], sentence: str) -> bool:
    """Whether this process is to say why it ends: of the ranks of a node that end with the same sentence, the first
    that asks. Where nothing tells the ranks of one start from those of another, each speaks.
    """
    start = _folder_of_start(environ)
    if start is None:
        return True
    try:
        os.close(os.open(f"{start}said-{hashlib.sha256(sentence.encode()).hexdigest()[:16]}",
                         os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:
        pass  # rather twice than not at all
    return True


def has_spoken(environ: Mapping[str, str]) -> bool:
    """Whether a rank of this node has said why it ends, as far as one can know."""
    start = _folder_of_start(environ)
    return start is not None and bool(glob.glob(f"{glob.escape(start)}said-*"))


def _folder_of_start(environ: Mapping[str, str]) -> str | None:
    """How the names of files begin that belong to this start of ranks on this node."""
    if "RANK" in environ and environ.get("TORCHELASTIC_ERROR_FILE"):
        return f"{Path(environ['TORCHELASTIC_ERROR_FILE']).parents[1]}/"  # torchrun's, below it a folder for each rank
    if "SLURM_PROCID" in environ and environ.get("SLURM_JOB_ID"):
        step = ".".join(environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
        return f"{tempfile.gettempdir()}/megatron_mixtral-{os.getuid()}-{step}-"
    return None


def decide_here(needed: int, nproc: int | None = None) -> Launch:
    """`decide` in this process's own environment."""
    return decide(os.environ, needed, nproc)


def is_first_here() -> bool:
    """Whether this process is rank 0, or no rank at all."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def only_prints() -> bool:
    """Whether a command is to print what it would start, as the shell scripts in examples/ do: DRY_RUN=1."""
    return os.environ.get("DRY_RUN") == "1"


def as_rank(work: Callable[[], None]) -> int:
    """Do what a command does on each of its ranks. Returns 0, or 1 where this rank leaves it to another one of its node
    to say what is wrong; else its `MixtralError` goes on, with the rank's number where that is not 0.
    """
    try:
        work()
    except MixtralError as error:
        if isinstance(error, RankLostError):
            time.sleep(1)  # the rank that was lost may have something to say, which explains this one's end
            if has_spoken(os.environ):
                return 1
        if not speaks(os.environ, str(error)):
            time.sleep(1)  # torchrun ends all when the first has ended: time for the one that speaks
            return 1
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            raise
        named = type(error)(f"rank {rank} on {socket.gethostname()}: {error}")
        for note in getattr(error, "__notes__", ()):
            named.add_note(note)
        raise named from error
    return 0


def _check_nproc(nproc: int | None, found: int, starter: str) -> None:
    if nproc not in (None, found):
        raise ConfigError(f"--nproc {nproc}, but {starter} has started {found} ranks: drop --nproc, which is for a "
                          "program that is started plainly")


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environ.get(name, default)
    if value is None or not str(value).isdecimal():
        raise ConfigError(f"{name} is {'not set' if value is None else repr(value)}, expected a number: torchrun and "
                          "srun set all of their variables; to start plainly, unset RANK, WORLD_SIZE and SLURM_PROCID")
    return int(value)


# -- Slurm -----------------------------------------------------------------------------------------------


def _tasks(environ: Mapping[str, str]) -> int:
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    return _number(environ, name, 1)


def _is_task(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several tasks. The script of sbatch and the shell of salloc have
    SLURM_PROCID=0 and SLURM_NTASKS too, but are alone: they have no step, or a special one.
    """
    if "SLURM_PROCID" not in environ or _tasks(environ) < 2:
        return False
    if "SLURM_STEP_ID" in environ:
        return _number(environ, "SLURM_STEP_ID") < _FIRST_SPECIAL_STEP
    return environ.get("ENVIRONMENT") != "BATCH"


def _rank_of_task(environ: Mapping[str, str], world: int) -> dict[str, str]:
    """torchrun's variables from Slurm's. MASTER_ADDR and MASTER_PORT of the user's own stay."""
    nodes = next((environ[name] for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
                  if environ.get(name)), "127.0.0.1")
    job, step = _number(environ, "SLURM_JOB_ID", 0), _number(environ, "SLURM_STEP_ID", 0)
    rank, local = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID")
    if rank >= world:
        raise ConfigError(f"SLURM_PROCID is {rank} in a step of {world} tasks")
    here = _tasks_of_node(environ, world)
    if environ.get("SLURM_GPUS_PER_TASK", "").endswith("1") and "," not in environ.get("CUDA_VISIBLE_DEVICES", ","):
        local, here = 0, 1  # each task sees its own GPU alone, as the first
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(here),
            "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(nodes),
            "MASTER_PORT": environ.get("MASTER_PORT") or str(_LOWEST_PORT + (16 * job + step) % _PORTS)}


def first_host(nodes: str) -> str:
    """The first name of Slurm's list: "gpu[007-009,12],login" -> gpu007."""
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", re.match(r"(?:[^,[]|\[[^]]*\])*", nodes)[0])


def _tasks_of_node(environ: Mapping[str, str], world: int) -> int:
    """Tasks of this step on this node: "4(x2),3" is 4, 4 and 3."""
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(world)
    each = [int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))]
    return each[min(_number(environ, "SLURM_NODEID", 0), len(each) - 1)]
