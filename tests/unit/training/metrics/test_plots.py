"""The pictures of runs show what the runs wrote."""

import json
from pathlib import Path

import pytest

from megatron_mixtral import __main__ as commands
from megatron_mixtral.training.metrics import plots as pictures


def write_run(folder: Path, steps: int, loads: bool = True) -> Path:
    folder.mkdir(parents=True)
    lines = [{"iteration": step, "lm_loss": 10.0 / step, "aux_loss": 1.0, "grad_norm": 0.5, "step_seconds": float(step),
              "tokens_per_second_per_device": 100.0 / step, "memory_bytes": 2**30, "expert_imbalance": 1.5,
              "expert_imbalance_worst": 2.0} for step in range(1, steps + 1)]
    again = {**lines[0], "lm_loss": 99.0}  # step 1 was taken twice
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (again, *lines)))
    if loads:
        (folder / "expert_load.jsonl").write_text("".join(
            json.dumps({"iteration": step, "expert_load": [[1, 2, 3, 2], [8, 0, 0, 0]]}) + "\n"
            for step in range(1, steps + 1)))
    return folder


def test_curves_and_maps_hold_the_metrics_of_the_runs(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "x" / "one", 10), write_run(tmp_path / "x" / "two", 80, loads=False)
    runs = [pictures.read_run(path, path.name) for path in (one, two)]
    top, *_ = pictures.loss(runs).axes
    curves = {line.get_label(): line for line in top.get_lines()}
    assert list(curves["one"].get_xdata()) == list(range(1, 11))
    assert list(curves["one"].get_ydata()) == [10.0 / step for step in range(1, 11)]
    assert len(curves["two"].get_ydata()) == 80, "long runs are smoothed, not cut"
    assert [text.get_text() for text in top.get_legend().get_texts()][0] == "one: 1.000 nats at the end"
    rates, *_ = pictures.throughput(runs).axes
    dashed = [line.get_ydata()[0] for line in rates.get_lines() if line.get_linestyle() == "--"]
    assert dashed == pytest.approx([10 * 100 / 55, 80 * 100 / (80 * 81 / 2)]), "all tokens / all time"
    assert rates.get_legend().get_texts()[0].get_text().endswith("tokens / s / device")
    _, load, *_ = pictures.expert_load(runs).axes
    assert load.get_images()[0].get_array().tolist() == [[0.5, 1.0, 1.5, 1.0], [4.0, 0.0, 0.0, 0.0]]


def test_the_tool_writes_three_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = write_run(tmp_path / "run", 3)
    assert commands.run("plot", [str(run)]) == 0
    written = [run / f"{name}.png" for name in ("loss", "throughput", "expert_load")]
    assert capsys.readouterr().out.split() == list(map(str, written))
    assert all(path.stat().st_size > 10_000 for path in written)


def test_runs_are_named_by_what_tells_them_apart() -> None:
    assert pictures.names_of([Path("/a/b/run"), Path("/a/c/run")]) == ["b/run", "c/run"]
    assert pictures.names_of([Path("/a/one"), Path("/a/two")]) == ["one", "two"]
    assert pictures.names_of([Path("/a/one")]) == ["one"]


@pytest.mark.parametrize(("text", "sentence"), [
    (None, "expected the folder of a run"), ("", "it holds no step"),
    ("oops\n{}\n", "line 1: expected the JSON object of a step"),
])
def test_what_is_no_run_is_refused(text: str | None, sentence: str, tmp_path: Path,
                                   capsys: pytest.CaptureFixture) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert commands.run("plot", [str(tmp_path)]) == 1
    assert sentence in capsys.readouterr().err
