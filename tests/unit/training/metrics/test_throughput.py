"""Averages over the steps of a run, from every log that is read."""

import json
from pathlib import Path

import pytest

from megatron_mixtral import __main__ as commands
from megatron_mixtral.errors import DataError
from megatron_mixtral.training.metrics import throughput

# The last eight lines of a published run of XTuner on 16 devices, whose mean is published as 1787.47.
XTUNER = """\
2024/12/11 13:19:58 - mmengine - INFO - Iter(train) [380/387]  lr: 2.1080e-07  eta: 0:02:08  time: 18.3345  \
data_time: 0.0554  memory: 65462  loss: 0.6420  tflops: 116.4251  tokens_per_sec: 1785.3621
2024/12/11 13:20:16 - mmengine - INFO - Iter(train) [381/387]  lr: 1.6141e-07  eta: 0:01:50  time: 18.3352  \
data_time: 0.0554  memory: 65459  loss: 0.6397  tflops: 116.5561  tokens_per_sec: 1787.3699
2024/12/11 13:20:35 - mmengine - INFO - Iter(train) [382/387]  lr: 1.1859e-07  eta: 0:01:31  time: 18.3368  \
data_time: 0.0561  memory: 65461  loss: 0.6420  tflops: 116.5291  tokens_per_sec: 1786.9560
2024/12/11 13:20:53 - mmengine - INFO - Iter(train) [383/387]  lr: 8.2362e-08  eta: 0:01:13  time: 18.3363  \
data_time: 0.0561  memory: 65460  loss: 0.6388  tflops: 116.6099  tokens_per_sec: 1788.1952
2024/12/11 13:21:11 - mmengine - INFO - Iter(train) [384/387]  lr: 5.2714e-08  eta: 0:00:55  time: 18.3374  \
data_time: 0.0563  memory: 65461  loss: 0.6324  tflops: 116.5887  tokens_per_sec: 1787.8706
2024/12/11 13:21:29 - mmengine - INFO - Iter(train) [385/387]  lr: 2.9653e-08  eta: 0:00:36  time: 18.3352  \
data_time: 0.0558  memory: 65462  loss: 0.6215  tflops: 116.6584  tokens_per_sec: 1788.9389
2024/12/11 13:21:48 - mmengine - INFO - Iter(train) [386/387]  lr: 1.3179e-08  eta: 0:00:18  time: 18.3343  \
data_time: 0.0558  memory: 65463  loss: 0.6225  tflops: 116.5881  tokens_per_sec: 1787.8610
2024/12/11 13:22:06 - mmengine - INFO - Iter(train) [387/387]  lr: 3.2949e-09  eta: 0:00:00  time: 18.3340  \
data_time: 0.0558  memory: 65464  loss: 0.6251  tflops: 116.5461  tokens_per_sec: 1787.2171
"""


def test_xtuners_lines_give_the_published_figure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = tmp_path / "20241211.log"
    log.write_text("unrelated\n" + XTUNER)
    assert commands.run("calc", [str(log), "380", "387"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("steps 380 to 387, 8 logged")
    assert out[1].split() == ["mean", "1787.47"]


def test_averages_differ_as_they_should(tmp_path: Path) -> None:
    """Two steps of 100 tokens in 1 and in 4 seconds: 200 tokens in 5 seconds is 40 a second, whatever the mean says."""
    (tmp_path / "metrics.jsonl").write_text("".join(
        json.dumps({"iteration": step, "tokens_per_second_per_device": 100 / seconds, "step_seconds": seconds}) + "\n"
        for step, seconds in ((1, 1.0), (2, 4.0))) + '{"iteration": 3, "tokens_per_sec')
    found = throughput.average(throughput.read(tmp_path / "metrics.jsonl"), 1, 2)
    assert (found.mean, found.time_weighted_mean, found.median, found.steps) == (62.5, 40.0, 62.5, 2)


@pytest.mark.parametrize("line", [
    "step {}/20 | lm loss 4.0000 | TGS {} tokens/s/device | 0.02 TFLOP/s/device | {} s | 0:00:24 left\n",  # rank logs
    "step {}/20 | loss 4.0000 | {} tokens/s/device | 0:00:24 left | {} s | grad 0.500 | lr 1.0e-05\n",  # the screen
])
def test_our_output_is_read_and_a_step_taken_again_counts_as_taken_last(line: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(line.format(1, "10.0", "1.000") + line.format(2, "1.0", "9.000") + line.format(2, "30.0", "3.000"))
    found = throughput.read(log)
    assert found == {1: throughput.Step(10.0, 1.0, 4.0), 2: throughput.Step(30.0, 3.0, 4.0)}
    assert throughput.average(found, 1, 2).time_weighted_mean == 25.0


def test_without_a_range_five_steps_at_either_end_are_left_out() -> None:
    steps = {number: throughput.Step(float(number), 1.0) for number in range(1, 21)}
    found = throughput.average(steps)
    assert (found.first, found.last, found.steps) == (6, 15, 10)


def test_of_a_short_log_all_steps_count() -> None:
    found = throughput.average({number: throughput.Step(float(number), 1.0) for number in range(1, 11)})
    assert (found.first, found.last, found.steps) == (1, 10, 10)


def test_the_first_step_at_a_target_loss_is_that_of_the_mean(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The mean of the last ten steps, so that one lucky step is not enough; steps that are not finite have no loss."""
    losses = [2.0] * 9 + [0.5] + [2.0] * 5 + [None] + [1.0] * 10 + [0.9]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps({"iteration": step, "tokens_per_second_per_device": 1.0, "step_seconds": 1.0,
                                       "lm_loss": loss}) + "\n" for step, loss in enumerate(losses, 1)))
    assert commands.run("calc", [str(log), "--target-loss", "1"]) == 0
    assert "loss at or below 1: step 26 (mean of the last 10 steps 1.0000)" in capsys.readouterr().out
    assert commands.run("calc", [str(log), "--target-loss", "0.7"]) == 0
    assert "not reached; the lowest mean of 10 steps is 0.9900, at step 27" in capsys.readouterr().out


def test_the_loss_of_xtuners_lines_is_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "log").write_text(XTUNER)
    assert commands.run("calc", [str(tmp_path / "log"), "--target-loss", "0.64"]) == 0
    mean = (0.6420 + 0.6397 + 0.6420 + 0.6388 + 0.6324 + 0.6215 + 0.6225 + 0.6251) / 8
    assert f"step 387 (mean of the last 10 steps {mean:.4f})" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "arguments", "sentence"), [
    (None, [], "cannot be read"), ("no steps\n", [], "no line has the throughput of a step"),
    (XTUNER, ["1", "9"], "no step from 1 to 9: the log has 8 steps, from 380 to 387"),
])
def test_what_cannot_be_averaged_is_refused(text: str | None, arguments: list[str], sentence: str, tmp_path: Path,
                                            capsys: pytest.CaptureFixture) -> None:
    log = tmp_path / "log"
    if text is not None:
        log.write_text(text)
    assert commands.run("calc", [str(log), *arguments]) == 1
    assert sentence in capsys.readouterr().err
    if text is not None:
        with pytest.raises(DataError):
            throughput.average(throughput.read(log), *map(int, arguments))
