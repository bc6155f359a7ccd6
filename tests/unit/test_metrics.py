"""The figures of a step: its own, over the whole step, in the log and in the file."""

import json
import logging
from pathlib import Path

import pytest

from megatron_mixtral.config import preset
from megatron_mixtral.training.metrics import StepClock, StepWriter


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


def test_step_is_written_once_with_its_own_figures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seconds = iter([2.0, 4.0])
    config = preset("mixtral-8x7b")
    writer = StepWriter(config, seq_length=4096, global_batch_size=lambda: 128, devices=16, train_iters=10,
                        lap=lambda iteration: next(seconds), consumed_samples=lambda: 128,
                        path=tmp_path / "run" / "metrics.jsonl")
    with caplog.at_level(logging.INFO):
        for iteration in (1, 2):
            writer.add_scalar("learning-rate", 1e-5, iteration)
            writer.add_scalar("lm loss", 2.0 + iteration, iteration)
            writer.add_scalar("lm loss vs samples", 99.0, 128)
            writer.add_scalar("grad-norm", 0.5, iteration)
            writer.add_scalar("load_balancing_loss", 1.01, iteration)
            writer.finish_step()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lm_loss"] for line in lines] == [3.0, 4.0]
    assert lines[0]["tokens_per_second_per_device"] == 128 * 4096 / 2.0 / 16
    assert lines[1]["tokens_per_second_per_device"] == 128 * 4096 / 4.0 / 16
    assert lines[1]["model_tflops_per_device"] == pytest.approx(
        128 * 4096 / 4.0 / 16 * config.training_flops_per_token(4096) / 1e12)
    assert "step 2/10 | lm loss 4.0000 | aux loss 1.0100 | grad norm 0.5000 | lr 1.000e-05 | " in caplog.text


def test_what_tensorboard_gets_is_passed_on() -> None:
    class Inner:
        def __init__(self) -> None:
            self.seen: list[tuple] = []

        def add_scalar(self, *args: object) -> None:
            self.seen.append(args)

    inner = Inner()
    writer = StepWriter(preset("tiny"), seq_length=1, global_batch_size=lambda: 1, devices=1, train_iters=None,
                        lap=lambda iteration: 1.0, consumed_samples=lambda: 0, inner=inner)
    writer.add_scalar("anything", 1, 7)
    assert inner.seen == [("anything", 1, 7)]
