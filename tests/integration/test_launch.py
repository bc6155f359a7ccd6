"""Who starts the ranks, for real: one plain process trains, starts torchrun itself, or is one of Slurm's tasks."""

import fcntl
import json
import multiprocessing
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from helpers.events import until
from helpers.ranks import prepare_fork_server

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
RECIPE = ["--model", "tiny", "--seq-length", "32", "--micro-batch-size", "1", "--global-batch-size", "2", "--lr",
          "1e-3", "--mock-data", "--eval-iters", "0", "--train-iters", "2"]
STARTERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "PYTHONPATH", "TORCHELASTIC_")


def environment() -> dict[str, str]:
    """This process's, without what anything that starts ranks would have set."""
    return {name: value for name, value in os.environ.items() if not name.startswith(STARTERS)}


def command(metrics: Path, *flags: str) -> list[str]:
    program = [sys.executable, str(ROOT / "tools" / "pretrain_mixtral.py")]
    return [*program, *RECIPE, "--metrics-file", str(metrics), *flags]


def losses(metrics: Path) -> list[float]:
    return [json.loads(line)["lm_loss"] for line in metrics.read_text().splitlines()]


def test_one_plain_process_trains(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    done = subprocess.run(command(metrics), cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(metrics)) == 2 and "starting" not in done.stderr


@pytest.fixture(scope="module")
def by_torchrun(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of tp2-pp2, whose four ranks the program starts itself, from another folder than the clone's."""
    folder = tmp_path_factory.mktemp("torchrun")
    done = subprocess.run(command(folder / "metrics.jsonl", *LAYOUT), cwd=folder, env=environment(),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "starting 4 ranks on this machine" in done.stderr
    return losses(folder / "metrics.jsonl")


def _task(number: int, job: int, argv: list[str], log: str) -> None:
    """What srun does for one of four tasks on a node."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for name in [name for name in os.environ if name.startswith(STARTERS)]:
        del os.environ[name]
    os.environ.update(SLURM_JOB_ID=str(job), SLURM_STEP_ID="0", SLURM_PROCID=str(number), SLURM_NTASKS="4",
                      SLURM_LOCALID=str(number), SLURM_JOB_NODELIST="localhost", SLURM_TASKS_PER_NODE="4")
    from megatron_mixtral.training import pretrain_command

    code = pretrain_command(argv)
    multiprocessing.util._exit_function()
    os._exit(code)


def a_job() -> int:
    """A job whose port is free."""
    for job in range(os.getpid(), os.getpid() + 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", 10000 + 16 * job % 20000))
                return job
            except OSError:
                continue
    raise AssertionError("no port is free")


def test_tasks_of_slurm_train_as_torchrun_s_ranks_do(tmp_path: Path, by_torchrun: list[float]) -> None:
    metrics, job = tmp_path / "metrics.jsonl", a_job()
    argv = [*RECIPE, *LAYOUT, "--metrics-file", str(metrics)]
    tasks = [prepare_fork_server().Process(target=_task, args=(number, job, argv, str(tmp_path / f"{number}.log")))
             for number in range(4)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
    assert [task.exitcode for task in tasks] == [0] * 4, (tmp_path / "0.log").read_text()[-3000:]
    assert losses(metrics) == by_torchrun


def test_a_wrong_number_of_tasks_is_refused_by_the_first(tmp_path: Path) -> None:
    def task(number: int) -> subprocess.CompletedProcess:
        slurm = {"SLURM_PROCID": str(number), "SLURM_NTASKS": "3", "SLURM_LOCALID": str(number), "SLURM_JOB_ID": "1",
                 "SLURM_JOB_NODELIST": "localhost", "TMPDIR": str(tmp_path)}
        argv = [sys.executable, str(ROOT / "tools" / "pretrain_mixtral.py"), *RECIPE, *LAYOUT]
        return subprocess.run(argv, env=environment() | slurm, capture_output=True, text=True)

    first, second = task(0), task(1)
    assert first.returncode == 1 and second.returncode == 1
    assert "world size 3 is not a multiple of tp x pp x cp = 4" in first.stderr and second.stderr == ""


def endless(tmp_path: Path) -> tuple[Path, list[str]]:
    """Where its metrics go, and the flags of a run that saves only when it is ended."""
    save = ["--save", str(tmp_path / "save"), "--save-interval", "100000"]
    return tmp_path / "metrics.jsonl", ["--train-iters", "100000", *save]


def made(metrics: Path, steps: int, run: subprocess.Popen) -> bool:
    return run.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") >= steps)


def saved(tmp_path: Path) -> int:
    return int((tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text())


def test_a_signal_reaches_the_ranks_that_it_started(tmp_path: Path) -> None:
    """The program has become torchrun: SIGTERM to it saves and ends the run, as under torchrun. SIGHUP, ignored since
    nohup started it, does nothing.
    """
    metrics, flags = endless(tmp_path)
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(["nohup", *command(metrics, "--nproc", "2", *flags)], cwd=tmp_path, env=environment(),
                               stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until(lambda: made(metrics, 2, run))
        run.send_signal(signal.SIGHUP)
        seen = len(losses(metrics))
        until(lambda: made(metrics, seen + 2, run))
        assert run.poll() is None, (tmp_path / "log").read_text()[-3000:]
        run.send_signal(signal.SIGTERM)
        assert run.wait() == 128 + signal.SIGTERM
    words = (tmp_path / "log").read_text()
    assert saved(tmp_path) == len(losses(metrics)), words[-3000:]
    assert "ended by SIGTERM" in words and "Traceback" not in words


def in_a_terminal() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_lost_terminal_saves_and_ends_the_run(tmp_path: Path) -> None:
    """torchrun in the foreground of a terminal that closes: SIGHUP, and nothing can be printed from then on."""
    metrics, flags = endless(tmp_path)
    argv = command(metrics, *flags)
    master, terminal = pty.openpty()
    run = subprocess.Popen([argv[0], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *argv[1:]],
                           cwd=tmp_path, env=environment(), stdin=terminal, stdout=terminal, stderr=terminal,
                           start_new_session=True, preexec_fn=in_a_terminal)
    os.close(terminal)
    words = b""
    while not made(metrics, 2, run):
        if select.select([master], [], [], 0.05)[0]:
            words += os.read(master, 1 << 16)
    assert run.poll() is None, words.decode()[-3000:]
    os.close(master)
    run.wait()
    assert saved(tmp_path) == len(losses(metrics))
