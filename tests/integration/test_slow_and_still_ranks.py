"""Four ranks of a real run: one that is stopped ends it with its name, one that is slow is named and no more."""

import os
import signal
import time
from collections import Counter
from pathlib import Path
from statistics import median

import pytest
from helpers import datasets
from helpers.events import until
from helpers.models import tiny_hf_mixtral
from helpers.program import Running, pretrain

RECIPE = ["--seq-length", "32", "--micro-batch-size", "1", "--global-batch-size", "4", "--lr", "1e-3",
          "--eval-iters", "0", "--lr-decay-style", "constant", "--rank-seconds-interval", "1"]
LIMIT = 10  # seconds


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    prefix = datasets.write_dataset(folder / "corpus_text_document", vocab_size=96)
    return ["--data-path", prefix, "--split", "1,0,0", "--data-cache-path", str(folder / "cache"), "--hf-checkpoint",
            str(tiny_hf_mixtral(folder / "hf"))]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 0])  # rank 0 keeps the store
def test_a_stopped_rank_ends_the_run_with_its_name(rank: int, inputs: list[str], tmp_path: Path) -> None:
    run = Running(4, [*RECIPE, *inputs, "--train-iters", "100000", "--rank-timeout-seconds", str(LIMIT), "--save",
                      str(tmp_path / "save"), "--save-interval", "100000"], tmp_path / "run")
    until(lambda: 3 in run.figures() or not run.alive(), "for three steps")
    os.kill(run.ranks[rank].pid, signal.SIGSTOP)
    began = time.monotonic()
    others = [process for number, process in enumerate(run.ranks) if number != rank]
    until(lambda: not any(process.is_alive() for process in others), "for the others to end")
    print(f"ended {time.monotonic() - began:.1f} s after the stop")
    outcome = run.finish()
    assert [code for number, code in enumerate(outcome.codes) if number != rank] == [1, 1, 1]
    for number, log in enumerate(outcome.logs):
        if number != rank:
            assert f"rank {rank} on " in log and ("no sign of life" in log or "keeps the store" in log)
            assert "Thread 0x" in log and "life.py" in log, "its stacks"
    if rank:
        assert "Thread 0x" in outcome.logs[rank], "the stacks of the one that was stopped"


def _slow_by_50_ms() -> None:
    from megatron_mixtral.training import micro_batch

    step = micro_batch.text_step

    def slow(*arguments: object, **options: object) -> object:
        """By work, not sleep: where ranks share cores, one that sleeps then has a core for itself, and ends first."""
        end = time.thread_time() + 0.05 * (os.environ["RANK"] == "3")
        while time.thread_time() < end:
            pass
        return step(*arguments, **options)

    micro_batch.text_step = slow


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[], ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]],
                         ids=["dp4", "tp2-pp2"])
def test_a_rank_that_is_slow_by_50_ms_is_named(layout: list[str], inputs: list[str], tmp_path: Path) -> None:
    outcome = pretrain(4, [*RECIPE, *inputs, *layout, "--train-iters", "20", "--save", str(tmp_path / "save"),
                           "--save-interval", "100"], tmp_path / "run", _slow_by_50_ms)
    assert outcome.codes == [0, 0, 0, 0], outcome.logs[-1][-3000:]
    steps = list(outcome.steps.values())[2:]
    for step in steps:
        assert len(step["rank_work_seconds"]) == len(step["rank_wait_seconds"]) == 4
    work = [median(step["rank_work_seconds"][rank] for step in steps) for rank in range(4)]
    print("median seconds of each rank's own work:", work)
    assert Counter(step["slowest_rank"] for step in steps).most_common(1)[0][0] == 3
    assert work[3] == max(work) and "slowest rank 3 on " in outcome.logs[3], "the last rank's log, of all that it says"
