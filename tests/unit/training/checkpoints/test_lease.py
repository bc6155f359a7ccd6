"""One run at a time in a directory: who is refused, who takes over and when, with two hosts and clocks that differ."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.events import until

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.training.checkpoints import heartbeat, lease
from megatron_mixtral.training.checkpoints.lease import Holder, acquire, refuse_if_held, this_process

TORCHRUN = {"TORCHELASTIC_RUN_ID": "r", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
# A run of its own process: it takes the lease, says so, and ends when it is told.
RUN = """import pathlib, sys
from megatron_mixtral.training.checkpoints.lease import acquire, this_process
held = acquire(pathlib.Path(sys.argv[1]), this_process({}))
print("held", flush=True)
sys.stdin.read()
held.release()
"""


class Clock:
    """Seconds that pass only while somebody sleeps; something may happen meanwhile."""

    def __init__(self, meanwhile: Callable[[float], object] = lambda now: None, began: float = 0.0) -> None:
        self.now, self._began, self._meanwhile = began, began, meanwhile

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._meanwhile(self.now - self._began)


def elsewhere(**changes: object) -> Holder:
    """A process of another host, whose number and start time mean nothing here."""
    return dataclasses.replace(this_process({}), **{"host": "other", "place": "another boot", "pid": 1, **changes})


def write(save: Path, holder: Holder) -> None:
    assert heartbeat.create(str(save / lease.NAME), json.dumps(dataclasses.asdict(holder)))


def whose(save: Path) -> str:
    return json.loads((save / lease.NAME).read_text().splitlines()[1])["token"]


def start(save: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, str(save)]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "held\n"
    until(lambda: int((save / lease.NAME).read_text().splitlines()[0]) > 0, "for a beat")
    return run


def guardian_of(run: subprocess.Popen) -> int:
    [child] = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    return int(child)


def test_the_second_is_refused_and_comes_when_the_first_has_ended(tmp_path: Path) -> None:
    first = start(tmp_path)
    with pytest.raises(CheckpointError, match=rf"another run is writing there, process {first.pid} on \S+ \(started 2"):
        acquire(tmp_path, this_process({}), sleep=pytest.fail)
    first.communicate()
    assert list(tmp_path.iterdir()) == []
    acquire(tmp_path, this_process({})).release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_gives_its_lease_back_by_its_guardian(tmp_path: Path, number: int) -> None:
    run = start(tmp_path)
    guardian = guardian_of(run)
    os.kill(guardian, signal.SIGTERM)  # it is for the run to end, and the guardian after it
    run.send_signal(number)
    run.communicate()
    until(lambda: not (tmp_path / lease.NAME).exists())
    until(lambda: [path.name for path in tmp_path.iterdir()] == [lease.NAME + heartbeat.LEFT])
    seen = lease.look(tmp_path)
    assert seen is not None and not seen.alive and str(run.pid) in seen.words  # onlookers know that it was killed
    acquire(tmp_path, this_process({})).release()
    assert not any(tmp_path.iterdir()) and lease.look(tmp_path) is None


def test_the_lease_of_a_run_killed_with_its_guardian_is_taken_over_at_once(tmp_path: Path) -> None:
    run = start(tmp_path)
    os.kill(guardian_of(run), signal.SIGKILL)
    run.kill()
    run.communicate()
    mine = this_process({})
    held = acquire(tmp_path, mine, sleep=pytest.fail)
    assert whose(tmp_path) == mine.token
    held.release()


def test_a_process_number_that_was_given_again_is_not_the_holder(tmp_path: Path) -> None:
    mine = this_process({})
    write(tmp_path, dataclasses.replace(mine, token="0" * 32, started=mine.started - 1))
    acquire(tmp_path, mine, sleep=pytest.fail).release()


def test_a_process_number_of_another_namespace_says_nothing(tmp_path: Path) -> None:
    """Containers of one host may share its name, not its process numbers."""
    mine = this_process({})
    write(tmp_path, dataclasses.replace(mine, token="0" * 32, place="another namespace", pid=2**22))
    clock = Clock()
    acquire(tmp_path, mine, clock=clock, sleep=clock.sleep).release()
    assert clock.now >= lease.STILL


@pytest.mark.parametrize("shift", [0.0, -1e9, 1e9])
def test_a_holder_on_another_host_is_alive_while_it_beats(tmp_path: Path, shift: float) -> None:
    """Its file's time is of another clock."""
    path, other = str(tmp_path / lease.NAME), elsewhere()
    write(tmp_path, other)

    def beat(now: float) -> None:
        if now >= 3:
            heartbeat.beat(path, other.token, 7)
        os.utime(path, (1.7e9 + shift, 1.7e9 + shift))

    clock = Clock(beat, began=1e6)
    with pytest.raises(CheckpointError, match="process 1 on other"):
        acquire(tmp_path, this_process({}), clock=clock, sleep=clock.sleep)
    assert 3 <= clock.now - 1e6 < 4 and whose(tmp_path) == other.token


@pytest.mark.parametrize("shift", [0.0, -1e9, 1e9])
def test_a_holder_on_another_host_is_dead_after_a_minute_without_a_beat(tmp_path: Path, shift: float) -> None:
    write(tmp_path, elsewhere())
    os.utime(tmp_path / lease.NAME, (1.7e9 + shift, 1.7e9 + shift))
    clock, mine = Clock(), this_process({})
    held = acquire(tmp_path, mine, clock=clock, sleep=clock.sleep)
    assert lease.STILL <= clock.now < lease.STILL + 1 and whose(tmp_path) == mine.token
    held.release()


def test_a_restart_of_the_same_job_takes_over_from_another_host_at_once(tmp_path: Path) -> None:
    again = this_process({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1"})
    write(tmp_path, elsewhere(job=again.job, restart=0))
    acquire(tmp_path, again, sleep=pytest.fail).release()


def test_ranks_beside_the_first_are_refused_by_another_job_only(tmp_path: Path) -> None:
    mine = this_process({**TORCHRUN, "RANK": "3"})
    refuse_if_held(tmp_path, mine, sleep=pytest.fail)
    write(tmp_path, elsewhere(job=mine.job))
    refuse_if_held(tmp_path, mine, sleep=pytest.fail)
    (tmp_path / lease.NAME).unlink()
    write(tmp_path, elsewhere(job=this_process({**TORCHRUN, "MASTER_ADDR": "localhost"}).job))
    refuse_if_held(tmp_path, mine, sleep=pytest.fail)  # node0 by another name
    for address in ({**TORCHRUN, "MASTER_PORT": "29501"}, {**TORCHRUN, "TORCHELASTIC_RUN_ID": "s"}, {}):
        other = elsewhere(job=this_process(address).job)
        (tmp_path / lease.NAME).unlink()
        write(tmp_path, other)
        clock = Clock(lambda now, token=other.token: heartbeat.beat(str(tmp_path / lease.NAME), token, 5))
        with pytest.raises(CheckpointError, match="on other"):
            refuse_if_held(tmp_path, mine, clock=clock, sleep=clock.sleep)
    clock = Clock()
    refuse_if_held(tmp_path, mine, clock=clock, sleep=clock.sleep)  # no beat: rank 0 will know
    assert clock.now < lease.STILL / 4


def test_a_rank_beside_the_first_sees_it_take_over_from_a_dead_run(tmp_path: Path) -> None:
    """Between two looks rank 0 of the same job has taken the lease: that is no other run."""
    first, me = this_process(TORCHRUN), this_process(TORCHRUN)
    dead = elsewhere(job=None)
    write(tmp_path, dead)

    def rank_0_takes_over(now: float) -> None:
        if whose(tmp_path) == dead.token:
            (tmp_path / lease.NAME).unlink()
            write(tmp_path, first)

    clock = Clock(rank_0_takes_over)
    refuse_if_held(tmp_path, me, clock, clock.sleep)
    assert whose(tmp_path) == first.token


def test_of_many_at_once_one_takes_over(tmp_path: Path) -> None:
    mine = this_process({})
    write(tmp_path, dataclasses.replace(mine, token="0" * 32, started=mine.started - 1))
    taken, refused = [], []

    def run() -> None:
        me = this_process({})
        try:
            taken.append(acquire(tmp_path, me))
        except CheckpointError:
            refused.append(me)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 7)
    taken[0].check()
    taken[0].release()
    assert list(tmp_path.iterdir()) == []


def test_what_is_put_away_by_mistake_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a look at a dead lease, or between it and the removal, another run has taken over."""
    write(tmp_path, other := elsewhere())
    heartbeat.remove(str(tmp_path / lease.NAME), "f" * 32, "mover")
    looks, real = iter([b"f" * 32]), heartbeat.read
    monkeypatch.setattr(heartbeat, "read", lambda path: next(looks, None) or real(path))
    heartbeat.remove(str(tmp_path / lease.NAME), "f" * 32, "mover")
    assert next(looks, None) is None and whose(tmp_path) == other.token and len(list(tmp_path.iterdir())) == 1


def test_an_address_of_the_own_host_names_no_job_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = set()
    for host in ("node0", "node1"):
        monkeypatch.setattr(lease.socket, "gethostname", lambda host=host: host)
        jobs |= {this_process({**TORCHRUN, "MASTER_ADDR": address}).job for address in ("localhost", "node0")}
    assert jobs == {"r at node0:29500", "r at node1:29500"}


def test_a_run_that_lost_its_lease_notices(tmp_path: Path) -> None:
    held = acquire(tmp_path, this_process({}))
    held.check()
    (tmp_path / lease.NAME).unlink()
    write(tmp_path, elsewhere())
    with pytest.raises(CheckpointError, match="no longer this run's: process 1 on other .* has taken it over"):
        held.check()
    held.release()
    assert whose(tmp_path)  # the other's


def test_a_file_that_says_nothing_is_watched(tmp_path: Path) -> None:
    (tmp_path / lease.NAME).touch()
    clock = Clock()
    acquire(tmp_path, this_process({}), clock=clock, sleep=clock.sleep).release()
    assert clock.now >= lease.STILL
    (tmp_path / lease.NAME).mkdir()
    with pytest.raises(CheckpointError, match="cannot be taken for this run: .*Is a directory"):
        acquire(tmp_path, this_process({}))
