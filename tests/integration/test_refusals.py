"""Refusals where ranks, nodes and runs meet: said once where they happen, and one run at a time in a directory."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.datasets import write_dataset
from helpers.events import HANG, until
from helpers.ports import free_port
from helpers.program import Halt, Running, pretrain
from test_guard_rails import TINY, refused
from test_launch import environment

from megatron_mixtral.training.checkpoints import directory
from megatron_mixtral.training.checkpoints.lease import NAME, acquire, this_process

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--model", "tiny", "--seq-length", "32", "--micro-batch-size", "1", "--global-batch-size", "4", "--lr", "1e-3",
         "--eval-iters", "0", "--train-iters", "6"]
# The program, in another folder on rank 1.
ASTRAY = f"""import os, runpy, sys
if os.environ["RANK"] == "1":
    os.chdir("/")
sys.path.insert(0, "{ROOT}/tools")
runpy.run_path("{ROOT}/tools/pretrain_mixtral.py", run_name="__main__")
"""


def torchrun(folder: Path, log: Path, program: Path, *how: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *how, str(program), *FLAGS, "--data-path",
               "corpus_text_document", "--data-cache-path", str(folder / "cache")]
    with log.open("w") as stream:
        return subprocess.Popen(command, cwd=folder, env=environment(), stdout=stream, stderr=stream)


def test_a_rank_that_fails_alone_says_so(tmp_path: Path) -> None:
    write_dataset(tmp_path / "corpus_text_document", vocab_size=96)
    (tmp_path / "astray.py").write_text(ASTRAY)
    run = torchrun(tmp_path, tmp_path / "log", tmp_path / "astray.py", "--standalone", "--nproc-per-node", "2")
    assert run.wait(HANG) == 1
    words = (tmp_path / "log").read_text()
    assert words.count("error: ") == 1, words
    assert f"error: rank 1 on {socket.gethostname()}: --data-path: corpus_text_document.bin does not exist" in words


def test_a_node_that_lacks_a_file_says_so_once(tmp_path: Path) -> None:
    """Two agents of torchrun, as on two nodes, with two ranks each; the second has no data."""
    port, nodes = str(free_port()), []
    for number in range(2):
        folder = tmp_path / f"node{number}"
        folder.mkdir()
        how = ["--nnodes", "2", "--node-rank", str(number), "--master-addr", "127.0.0.1", "--master-port", port]
        nodes.append(torchrun(folder, tmp_path / f"log{number}", ROOT / "tools" / "pretrain_mixtral.py", *how,
                              "--nproc-per-node", "2"))
    write_dataset(tmp_path / "node0" / "corpus_text_document", vocab_size=96)
    assert nodes[1].wait(HANG) == 1
    nodes[0].terminate()
    nodes[0].wait(HANG)
    words = (tmp_path / "log1").read_text()
    assert words.count("error: ") == words.count("corpus_text_document.bin does not exist") == 1, words
    assert "does not exist" not in (tmp_path / "log0").read_text()


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "corpus_text_document", vocab_size=96)


def test_two_runs_in_one_directory(prefix: str, tmp_path: Path) -> None:
    """The second is refused and changes nothing; once the first is killed, the next one goes on in its place."""
    save = tmp_path / "save"
    flags = [*FLAGS, "--data-path", prefix, "--save", str(save), "--load", str(save), "--save-interval", "2"]
    first = Running(1, flags, tmp_path / "first", halt=Halt(0, batch=13))
    until(lambda: first.halted() or not first.alive())
    draft = directory.draft(save, 4)  # as if it were saving
    second = pretrain(1, flags, tmp_path / "second")
    assert second.codes == [1] and draft.exists() and second.steps == {}
    assert f"another run is writing there, process {first.ranks[0].pid} on" in second.logs[0]
    assert "Traceback" not in second.logs[0]
    os.kill(first.ranks[0].pid, signal.SIGKILL)
    first.finish()
    third = pretrain(1, flags, tmp_path / "third")
    assert third.codes == [0], third.logs[0][-3000:]
    assert sorted(third.steps) == [3, 4, 5, 6] and not draft.exists() and not (save / NAME).exists()


def test_the_second_run_is_refused_in_a_moment(tmp_path: Path) -> None:
    held = acquire(tmp_path, this_process({}))
    argv = [*TINY, "--mock-data", "--save", str(tmp_path), "--save-interval", "1"]
    assert f"another run is writing there, process {os.getpid()} on" in refused(argv, world=2)
    held.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--save", "/proc/run", "--save-interval", "1"], "--save: the run cannot write in /proc/run (No such file"),
    (["--tensorboard-dir", "/dev/null/board"], "--tensorboard-dir: the run cannot write in /dev/null/board (Not a dir"),
    (["--metrics-file", "/proc/self/metrics.jsonl"], "--metrics-file: the run cannot write in /proc/self ("),
    (["--data-cache-path", "/dev/null/c"], "--data-cache-path: the run cannot write in /dev/null/c (Not a directory)"),
])
def test_a_place_that_cannot_be_written_is_found_before_the_model_is_built(
        flags: list[str], sentence: str, prefix: str) -> None:
    assert sentence in refused([*TINY, "--data-path", prefix, *flags])
