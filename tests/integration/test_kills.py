"""Kill -9 at any place: the same command goes on, never from a damaged checkpoint, to the same bits."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import datasets
from helpers.events import HANG, until
from helpers.models import tiny_hf_mixtral
from helpers.program import Halt, Outcome, Running, pretrain

from megatron_mixtral.training.checkpoints import directory as retention
from megatron_mixtral.training.checkpoints import integrity as manifest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30
FLAGS = ["--pipeline-model-parallel-size", "2", "--seq-length", "32", "--micro-batch-size", "1",
         "--global-batch-size", "4", "--lr", "3e-3", "--lr-decay-style", "linear", "--clip-grad", "1.0",
         "--eval-iters", "0", "--use-distributed-optimizer", "--train-iters", str(STEPS)]
RANKS = 2
SAVING = {0: (23, 42), 1: (5, 6)}  # the changes of rank 0 in its second save; the second save of rank 1, or a later one
# Rank 1 of the first life stands still in the third step.
HELD = """import logging, os, pathlib, runpy, sys
import megatron_mixtral.runtime
from helpers.program import _record_samples
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # it says its repairs here, once
    megatron_mixtral.runtime.ready(training=True)
    _record_samples(pathlib.Path(__file__).parent, 9)
sys.path.insert(0, "tools")
runpy.run_path("tools/pretrain_mixtral.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def start(folder: Path) -> list[str]:
    hf = tiny_hf_mixtral(folder / "hf")
    prefix = datasets.write_dataset(folder / "corpus_text_document", vocab_size=96)
    return [*FLAGS, "--data-path", prefix, "--split", "969, 30, 1", "--data-cache-path", str(folder / "cache"),
            "--hf-checkpoint", str(hf)]


@pytest.fixture(scope="module")
def whole(start: list[str], folder: Path) -> Outcome:
    outcome = pretrain(RANKS, start, folder / "whole")
    assert outcome.codes == [0, 0], outcome.logs[0][-3000:]
    return outcome


def saving(save: Path, *more: str) -> list[str]:
    return ["--save", str(save), "--load", str(save), "--save-interval", "1", "--save-total-limit", "2",
            *more]


def being_saved(save: Path) -> bool:
    return any(save.glob(".saving-*"))


def assert_only_whole_checkpoints(save: Path) -> None:
    for iteration in retention.iterations(save):
        directory = save / retention.name_of(iteration)
        assert manifest.damage(directory, manifest.read_manifest(directory)) == []
    if (save / retention.TRACKER).exists():
        assert int((save / retention.TRACKER).read_text()) in retention.iterations(save)


def assert_same_steps(found: dict, whole: Outcome) -> None:
    for step, figures in found.items():
        assert (figures["lm_loss"], figures["grad_norm"]) == (whole.steps[step]["lm_loss"],
                                                              whole.steps[step]["grad_norm"]), f"step {step}"


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_places(kills: int, start: list[str], whole: Outcome, tmp_path: Path) -> None:
    """Half of the kills fall into a save; one rank or all of them; saves in the foreground and in the background."""
    chance = random.Random(kills)
    save, done, in_saves = tmp_path / "save", 0, 0
    while done < kills:
        mode = ["--async-save"] if done % 4 >= 2 else []
        rank = chance.randrange(RANKS)
        halt = Halt(rank, saving=chance.randint(*SAVING[rank])) if done % 2 == 0 else Halt(rank, chance.randint(5, 12))
        running = Running(RANKS, [*start, *saving(save, *mode)], tmp_path / f"life{done}", halt=halt)
        until(lambda running=running: running.halted() or not running.alive())
        assert running.alive(), running.finish().logs[0][-3000:]
        in_saves += being_saved(save)
        doomed = running.ranks if chance.random() < 0.5 else [chance.choice(running.ranks)]
        for process in doomed:
            os.kill(process.pid, signal.SIGKILL)
        outcome = running.finish()
        assert all(code != 0 for code in outcome.codes), "it should not have come to its end"
        assert_only_whole_checkpoints(save)
        assert_same_steps(outcome.steps, whole)
        done += 1
    assert in_saves >= kills // 2
    latest = max([int((save / retention.TRACKER).read_text()), *_not_yet_named(save)])
    last = pretrain(RANKS, [*start, *saving(save)], tmp_path / "last")
    assert last.codes == [0, 0], last.logs[0][-3000:]
    assert sorted(last.steps) == list(range(latest + 1, STEPS + 1)), "it goes on from the last whole checkpoint"
    assert_same_steps(last.steps, whole)
    assert sorted(path.name for path in save.iterdir() if path.name.startswith(".")) == []


def _not_yet_named(save: Path) -> list[int]:
    """The checkpoint that a kill between its name and its tracker left."""
    found = retention.unfinished(save)
    return [] if found is None else [int(found[0].read_text())]


def test_the_others_say_that_a_rank_is_gone(start: list[str], tmp_path: Path) -> None:
    running = Running(RANKS, start, tmp_path, halt=Halt(0, batch=9))
    until(lambda: running.halted() or not running.alive())
    os.kill(running.ranks[0].pid, signal.SIGKILL)
    until(lambda: not running.alive(), "for the other rank to end by itself")
    outcome = running.finish()
    assert outcome.codes == [-signal.SIGKILL, 1]
    assert ": stopped, because another rank has ended" in outcome.logs[1]
    assert "Traceback" not in outcome.logs[1]


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_torchrun_restarts_and_the_run_goes_on(start: list[str], whole: Outcome, tmp_path: Path) -> None:
    save = tmp_path / "save"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--max-restarts", "1",
               "--standalone", str(tmp_path / "held.py"), *start, *saving(save)]
    (tmp_path / "held.py").write_text(HELD)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                               env={**os.environ, "PYTHONPATH": path})
        try:
            until(lambda: (tmp_path / "halted").exists() or run.poll() is not None)
            assert run.poll() is None, (tmp_path / "log").read_text()[-3000:]
            ranks = [pid for pid in children(run.pid) if "held.py" in Path(f"/proc/{pid}/cmdline").read_text()]
            assert len(ranks) == RANKS, (tmp_path / "log").read_text()[-3000:]
            os.kill(ranks[1], signal.SIGKILL)
            assert run.wait(HANG) == 0, (tmp_path / "log").read_text()[-3000:]
        finally:
            for pid in (*children(run.pid), run.pid) if run.poll() is None else ():
                os.kill(pid, signal.SIGKILL)
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert_same_steps({figures["iteration"]: figures for figures in lines}, whole)
    starts = sum(file.read_text().count("engine repairs") for file in save.glob("logs/20*/rank_*.log"))
    assert starts == 2 * RANKS and lines[-1]["iteration"] == STEPS
    steps = [figures["iteration"] for figures in lines]
    assert steps.count(1) == 1, "it went on from a checkpoint"
