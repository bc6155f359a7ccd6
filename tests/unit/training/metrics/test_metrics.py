"""The metrics of a step: its own, over the whole step, in the log and in the file."""

import json
import logging
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_mixtral.errors import DivergedError
from megatron_mixtral.training.metrics import waiting as waiting_module
from megatron_mixtral.training.metrics import writer as module
from megatron_mixtral.training.metrics.expert_load import Imbalance
from megatron_mixtral.training.metrics.writer import RunFacts, StepClock, StepWriter


class Timer:
    """The engine's timer as the clock sees it: seconds since its last reset."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def elapsed(self, reset: bool) -> float:
        assert not reset, "only the engine resets it"
        return self.seconds


@pytest.mark.parametrize("log_interval", [1, 3, 100])
def test_clock_gives_each_step_its_own_seconds(log_interval: int) -> None:
    timer = Timer()
    clock, found = StepClock(timer, log_interval), []
    durations = [5.0, 1.0, 2.0, 0.5, 4.0, 3.0, 1.5]
    for iteration, seconds in enumerate(durations, start=1):
        timer.seconds += seconds
        found.append(clock.lap(iteration))
        if iteration % log_interval == 0:
            timer.seconds = 0.0
    assert found == pytest.approx(durations)


def writer(**given: Any) -> StepWriter:
    defaults = {"lap": lambda iteration: 2.0, "global_batch_size": lambda: 128, "train_iters": lambda: 10,
                "consumed_samples": lambda: 128}
    facts = RunFacts(flops_per_token=3_000_000, seq_length=4096, devices=16, peak_tflops=given.pop("peak", None),
                     smallest_loss_scale=given.pop("smallest_loss_scale", None))
    return StepWriter(facts, **{**defaults, **given})


def test_step_is_written_once_with_its_own_metrics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seconds = iter([2.0, 4.0])
    out = writer(lap=lambda iteration: next(seconds), path=tmp_path / "run" / "metrics.jsonl", peak=0.5,
                 load_path=tmp_path / "run" / "expert_load.jsonl")
    with caplog.at_level(logging.INFO):
        for iteration in (1, 2):
            out.add_scalar("learning-rate", 1e-5, iteration)
            out.add_scalar("lm loss", 2.0 + iteration, iteration)
            out.add_scalar("lm loss vs samples", 99.0, 128)
            out.add_scalar("grad-norm", 0.5, iteration)
            out.add_scalar("load_balancing_loss", 1.01, iteration)
            out.observe(expert_tokens=[[10, 10, 10, 10], [30, 10, 0, 0]], memory_bytes=3 * 2**30,
                        data_seconds=0.25)
            out.finish_step()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lm_loss"] for line in lines] == [3.0, 4.0]
    assert lines[0]["tokens_per_second_per_device"] == 128 * 4096 / 2.0 / 16
    assert lines[1]["tokens_per_second_per_device"] == 128 * 4096 / 4.0 / 16
    assert lines[1]["model_tflops_per_device"] == pytest.approx(128 * 4096 / 4.0 / 16 * 3e6 / 1e12)
    assert lines[1]["mfu"] == pytest.approx(lines[1]["model_tflops_per_device"] / 0.5)
    assert (lines[1]["expert_imbalance"], lines[1]["expert_imbalance_worst"]) == (2.0, 3.0)
    assert lines[1]["seconds_left"] == 8 * 3.0, "the median of the steps so far"
    assert (lines[1]["samples_per_second"], lines[1]["data_seconds"]) == (128 / 4.0, 0.25)
    times = [datetime.fromisoformat(line["time"]) for line in lines]
    assert times[0] <= times[1] <= datetime.now(UTC) and times[1].utcoffset() == timedelta(0)
    loads = [json.loads(line) for line in (tmp_path / "run" / "expert_load.jsonl").read_text().splitlines()]
    assert loads == [{"iteration": i, "expert_load": [[10, 10, 10, 10], [30, 10, 0, 0]]} for i in (1, 2)]
    assert ("step 2/10 | lm loss 4.0000 | aux loss 1.0100 | grad norm 0.5000 | lr 1.000e-05 | "
            "TGS 8192.0 tokens/s/device | 0.02458 TFLOP/s/device | MFU 4.9% | memory 3.00 GiB | "
            "expert load 2.00 (layer 1: 3.00) | 4.000 s | 0:00:24 left") in caplog.text
    last = caplog.records[-1]
    assert last.shown == ("step 2/10 | loss 4.0000 | 8192.0 tokens/s/device | 0:00:24 left | 4.000 s | grad 0.500 | "
                          "lr 1.0e-05")
    assert last.status == "step 2/10 | loss 4.0000 | 8192.0 tokens/s/device | 0:00:24 left"


def test_waiting_for_data_is_that_of_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(waiting_module.time, "perf_counter", lambda: next(clock))
    waiting = waiting_module.Waiting()
    step = waiting.timed(lambda data, model: next(data))
    batches, model = iter("abc"), SimpleNamespace(training=True)
    assert [step(batches, model), step(batches, model)] == ["a", "b"]
    assert step(batches, SimpleNamespace(training=False)) == "c", "validation"
    assert (waiting.take(), waiting.take()) == (2, 0), "a second a read, of this step alone"


def test_a_metric_of_one_step_is_not_the_next_ones(tmp_path: Path) -> None:
    """A skipped step has no loss: the last one's must not stand in."""
    out = writer()
    out.add_scalar("lm loss", 2.0, 1)
    assert out.finish_step()["lm_loss"] == 2.0
    out.add_scalar("learning-rate", 1e-5, 2)
    found = out.finish_step()
    assert found["iteration"] == 2 and "lm_loss" not in found and "mfu" not in found


def test_figures_of_questions_stand_in_the_line_of_their_step(tmp_path: Path) -> None:
    logged = []
    out = writer(path=tmp_path / "metrics.jsonl",
                 wandb=SimpleNamespace(log=lambda values, step: logged.append((step, values.get("eval/mmlu/acc")))))
    for iteration, figures in enumerate(({}, {"eval/mmlu/acc": 0.5}, {}), start=1):
        out.add_scalar("lm loss", 2.0, iteration)
        out.evaluated(figures)
        out.finish_step()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("eval/mmlu/acc") for line in lines] == [None, 0.5, None]
    assert logged == [(1, None), (2, 0.5), (3, None)]


class Board:
    """A TensorBoard writer."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def add_scalar(self, *args: object) -> None:
        self.seen.append(args)


def test_tensorboard_gets_its_interval_and_whatever_is_not_of_every_step() -> None:
    board = Board()
    out = writer(tensorboard=board, tensorboard_interval=2)
    for iteration in (1, 2):
        out.add_scalar("lm loss", 3.0, iteration)
        out.add_scalar("lm loss vs samples", 3.0, 128 * iteration)
        out.add_scalar("lm loss validation", 2.5, iteration)
        out.finish_step()
    ours = [name for name, _, _ in board.seen if name == "tokens-per-second-per-device"]
    assert [args for args in board.seen if args[0].startswith("lm loss")] == [
        ("lm loss validation", 2.5, 1), ("lm loss", 3.0, 2), ("lm loss vs samples", 3.0, 256),
        ("lm loss validation", 2.5, 2)]
    assert len(ours) == 1


@pytest.mark.parametrize(("tokens", "mean", "worst", "layer"), [
    ([[5, 5], [5, 5]], 1.0, 1.0, 0), ([[5, 5], [10, 0]], 1.5, 2.0, 1), ([[0, 0], [1, 3]], 1.25, 1.5, 1),
])
def test_imbalance_is_the_busiest_expert_over_the_average(tokens: list, mean: float, worst: float, layer: int) -> None:
    assert Imbalance.of(tokens) == Imbalance(mean, worst, layer)


def test_steps_that_are_not_finite_are_counted_and_end_the_run(tmp_path: Path) -> None:
    consumed = iter(range(128, 2000, 128))
    out = writer(path=tmp_path / "metrics.jsonl", max_nan_steps=2, consumed_samples=lambda: next(consumed))

    def step(iteration: int, loss: float, norm: float) -> None:
        out.add_scalar("lm loss", loss, iteration)
        out.add_scalar("grad-norm", norm, iteration)
        out.finish_step()

    step(1, math.nan, math.inf)
    step(2, 2.0, 1.0)
    step(3, 2.0, math.inf)
    with pytest.raises(DivergedError, match=r"2 steps in a row .*-nan-steps 2\); they read samples 256 to 511 of"):
        step(4, math.nan, math.inf)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [1, 1, 2, 3]
    assert [line["lm_loss"] for line in lines] == [None, 2.0, 2.0, None]


def test_steps_that_the_loss_scaler_skips_are_counted_and_end_the_run_where_the_scale_cannot_fall(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = writer(path=tmp_path / "metrics.jsonl", max_nan_steps=2, smallest_loss_scale=1.0)

    def step(iteration: int, skipped: bool, scale: float) -> None:
        out.add_scalar("lm loss", 2.0, iteration)
        out.finish_step(skipped=skipped, loss_scale=scale)

    with caplog.at_level(logging.INFO):
        for iteration, scale in enumerate((8.0, 4.0, 2.0), 1):
            step(iteration, True, scale)
        step(4, False, 2.0)
        step(5, True, 1.0)
        with pytest.raises(DivergedError, match="2 steps in a row"):
            step(6, True, 1.0)
    assert "step 2 is skipped and the weights stay as they were: its scaled gradients overflow; the loss scale is now" \
        " 4; it read" in caplog.text
    assert "the loss scale is now 1 and cannot fall further; it read samples 0 to 127" in caplog.text
    assert "step 4/10 | lm loss 2.0000 | loss scale 2 | " in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["skipped_steps"], line["loss_scale"]) for line in lines] == [(1, 8), (2, 4), (3, 2), (3, 2), (4, 1),
                                                                               (5, 1)]


def test_a_full_disk_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    full = open("/dev/full", "a", encoding="utf-8")
    module._write_line(full, {"iteration": 1})
    assert "/dev/full cannot be written now: [Errno 28]" in caplog.text
    with pytest.raises(OSError):  # the line is still there
        full.close()
