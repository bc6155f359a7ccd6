"""One run at a time in a --save directory: SAVE/.lease says whose it is.

Two runs would remove each other's drafts and mix their checkpoints. Rank 0 holds the lease from before torch is
imported to its end. A holder is alive or dead by its process number and start time, where these can be looked up (same
host, boot and process namespace). Elsewhere its beats decide: they are watched, not dated, so clocks need not agree. No
lock of the file system is needed. `training/pretrain.py` calls it.
"""

import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.training.checkpoints import heartbeat

logger = logging.getLogger(__name__)

NAME = ".lease"
STILL = 60.0  # seconds without a beat after which a holder on another host counts as dead
WATCHED = 3 * heartbeat.EVERY  # seconds after which a rank that need not take the lease leaves the answer to rank 0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Holder:
    """A process that holds a lease, or wants one."""

    token: str
    host: str
    place: str  # boot and process namespace: where `pid` and `started` have a meaning
    pid: int
    started: int  # in the kernel's ticks since boot: a later process of the same number has another
    job: str | None  # the same for all ranks and restarts of one torchrun or step of srun
    restart: int
    since: str  # for the reader
    may_recur: bool = True  # whether a later start may have the same job: torchrun's name may be the user's, or "none"


def this_process(environ: Mapping[str, str]) -> Holder:
    """This process as a holder; `environ` says which job it belongs to."""
    host = socket.gethostname()
    address, port = environ.get("MASTER_ADDR", "127.0.0.1"), environ.get("MASTER_PORT", "0")
    name = environ.get("TORCHELASTIC_RUN_ID") or f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    job = None if port == "0" else f"{name} at {host if address in _LOOPBACK else address}:{port}"
    restart = environ.get("TORCHELASTIC_RESTART_COUNT") or environ.get("SLURM_RESTART_COUNT") or "0"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    started = _started(os.getpid())
    assert started is not None, "this process runs"
    may_recur = "TORCHELASTIC_RUN_ID" in environ or "SLURM_STEP_ID" not in environ
    return Holder(uuid.uuid4().hex, host, place, os.getpid(), started, job, int(restart),
                  time.strftime("%Y-%m-%d %H:%M:%S"), may_recur)


def acquire(save: Path, me: Holder, still: float = STILL, clock: Callable[[], float] = time.monotonic,
            sleep: Callable[[float], None] = time.sleep) -> "Lease":
    """Take the lease of `save`, from a dead holder too. `CheckpointError` where another run is alive; on another host
    that is known after a beat, and that it is dead after `still` seconds without one. `clock` and `sleep`: seconds.
    """
    path = str(save / NAME)
    try:
        while not heartbeat.create(path, json.dumps(asdict(me))):
            dead = _wait(path, me, still, clock, sleep)
            if dead is not None:
                logger.info("--save %s: taken over from %s, which is gone", save, _words(dead))
                heartbeat.remove(path, dead.token, me.token)
        with suppress(FileNotFoundError):
            os.unlink(path + heartbeat.LEFT)
    except OSError as error:
        raise CheckpointError(f"--save {save} cannot be taken for this run: {error}") from error
    return Lease(save, me.token)


def refuse_if_held(save: Path, me: Holder, clock: Callable[[], float] = time.monotonic,
                   sleep: Callable[[float], None] = time.sleep) -> None:
    """`CheckpointError` where a run other than this job's own is seen to be alive; for ranks whose rank 0 acquires."""
    _wait(str(save / NAME), me, WATCHED, clock, sleep, beside=True)


def same_start(one: Holder, other: Holder) -> bool:
    """Whether they are ranks of one job, which has not been started again between them."""
    return _same_job(one, other) and one.restart == other.restart


class Lease:
    """A lease that is held, and kept alive by a process of its own."""

    def __init__(self, save: Path, token: str) -> None:
        self._save, self._path, self._token = save, str(save / NAME), token
        command = [sys.executable, "-I", "-S", heartbeat.__file__, self._path, token, str(os.getpid())]
        # In a session of its own: signals of a terminal and of torchrun go to groups of processes.
        self._beats = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL, start_new_session=True)

    def check(self) -> None:
        """`CheckpointError` where another run has taken the directory, because no beat of this one reached it."""
        content = heartbeat.read(self._path)
        if content is not None and self._token.encode() in content:
            return
        holder = _parse(content)
        raise CheckpointError(f"--save {self._save} is no longer this run's: "
                              f"{'its lease is gone' if holder is None else _words(holder) + ' has taken it over'}. "
                              f"Nothing more is saved here; a lease is lost after {STILL:.0f} s without a sign of life")

    def release(self) -> None:
        """Give the directory free."""
        self._beats.kill()
        self._beats.wait()
        heartbeat.remove(self._path, self._token, self._token)


@dataclass(frozen=True)
class Sight:
    """What an onlooker sees of a run: whose it is, in words, and whether it lives. Where only beats tell that (`alive`
    is None), it lives as long as `beats` changes within `STILL` seconds.
    """

    words: str
    alive: bool | None
    beats: bytes


def look(save: Path) -> Sight | None:
    """The run that holds `save`, or the killed one that was its last; None where the last ended by itself."""
    path, me = str(save / NAME), this_process({})
    content = heartbeat.read(path)
    if content is None:
        left = heartbeat.read(path + heartbeat.LEFT)
        return None if left is None else Sight(_words(_parse(left)), False, left)
    holder = _parse(content)
    alive = _started(holder.pid) == holder.started if holder is not None and _is_here(holder, me) else None
    return Sight(_words(holder), alive, content)


def _is_here(holder: Holder, me: Holder) -> bool:
    """Whether its process number has a meaning for me."""
    return (holder.host, holder.place) == (me.host, me.place)


def _same_job(one: Holder, other: Holder) -> bool:
    """Nodes may call the first one by different names. Where a rank is silent in error, rank 0 is not."""
    one_job, other_job = (None if who.job is None else re.sub(" at .*:", ":", who.job) for who in (one, other))
    return one_job is not None and one_job == other_job


def _wait(path: str, me: Holder, still: float, clock: Callable[[], float], sleep: Callable[[float], None],
          beside: bool = False) -> Holder | None:
    """Wait until the lease can be removed: its dead holder; None where it is gone. `CheckpointError` where it lives.

    A rank `beside` the first is content, too, once its own job has the lease, which rank 0 may take at any moment.
    """
    first, began = None, clock()
    while (content := heartbeat.read(path)) is not None:
        holder = _parse(content)
        if beside and holder is not None and _same_job(holder, me):
            return None
        if holder is not None and _is_here(holder, me):
            if _started(holder.pid) != holder.started:
                return holder
            raise _refusal(path, holder)
        if holder is not None and holder.job is not None and holder.job == me.job and holder.restart < me.restart:
            return holder  # torchrun has stopped it before it started this one
        if first is None:
            first = content
            logger.info("%s is %s's: watching whether that is alive", path, _words(holder))
        elif content != first:
            raise _refusal(path, holder)
        elif clock() - began >= still:
            return holder or Holder("", "unknown", "", 0, 0, None, 0, "unknown")
        sleep(heartbeat.EVERY / 4)
    return None


def _refusal(path: str, holder: Holder | None) -> CheckpointError:
    return CheckpointError(f"--save {Path(path).parent}: another run is writing there, {_words(holder)}. Stop it, or "
                           "give another directory; two runs would remove each other's checkpoints")


def _words(holder: Holder | None) -> str:
    return "an unknown process" if holder is None else (
        f"process {holder.pid} on {holder.host} (started {holder.since})")


def _parse(content: bytes | None) -> Holder | None:
    """The holder; None where the file is not whole, as it is for a moment while it is made."""
    try:
        return Holder(**json.loads((content or b"").partition(b"\n")[2]))
    except (ValueError, TypeError):
        return None


def _started(pid: int) -> int | None:
    """When a process of this namespace was started, in ticks since boot (proc(5), field 22); None where it is not
    there, or only waits for its parent to take notice of its end.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if state in b"ZX" else int(fields[18])
