"""What benchmarks/gpu/first_run.sh is made of: its Python parts on the CPU at small widths, its limits, its account."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from benchmarks import step_breakdown
from benchmarks.gpu import check_run

ROOT = Path(__file__).resolve().parents[2]


def python(*words: str | Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_environment_is_reported(tmp_path: Path) -> None:
    done = python("benchmarks/gpu/environment.py", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["packages"]["megatron-core"] and found["library"]["device"] == "cpu"
    assert not found["torch"]["available"] and "library: " in done.stdout


def test_every_check_of_the_probe_runs(tmp_path: Path) -> None:
    done = python("benchmarks/gpu/probe.py", "--small", "--device", "cpu", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert not found["failed"] and found["attention_in_a_window"]["gradients"] < 0.03
    assert done.stdout.count("ok   ") == 9


@pytest.mark.slow
def test_a_candidate_that_fails_leaves_the_others_and_says_why(tmp_path: Path) -> None:
    small = ["--layers", 1, "--sequence", 32, "--product", 32, "--rounds", 1, "--engine", "no_such_field=1"]
    done = python("benchmarks/train_step.py", "--only", "ours", "te", "stock", "--one-by-one", *small,
                  "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert "Traceback" in found["left_out"]["ours"] and "no_such_field" in found["left_out"]["ours"]
    assert found["left_out"]["te"] == "transformer-engine cannot be imported"
    assert found["candidates"]["stock"]["step_seconds"] > 0


def test_kernels_are_counted_where_they_were_started() -> None:
    """torch lists the kernels of a GPU as events of their own, beside the operations that have their time."""
    events = [SimpleNamespace(name=name, device_type=kind) for name, kind in (
        ("aten::mm", DeviceType.CPU), ("a kernel", DeviceType.CUDA), ("ProfilerStep#1", DeviceType.CPU))]
    assert [event.name for event in step_breakdown.operations(events)] == ["aten::mm"]


def lines(losses: list[Any], start: int = 1) -> list[dict[str, Any]]:
    return [{"iteration": start + index, "lm_loss": loss, "tokens_per_second_per_device": 5.0}
            for index, loss in enumerate(losses)]


FALLING = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]


@pytest.mark.parametrize(("found", "sentence"), [
    (lines(FALLING), None),
    (lines(FALLING[:4]) + lines(FALLING[4:], start=4), "expected steps 1 to 8"),
    (lines([*FALLING[:-1], float("nan")]), "not finite"),
    (lines(FALLING[::-1]), "does not fall"),
])
def test_a_resumed_run_is_one_run(found: list[dict[str, Any]], sentence: str | None) -> None:
    figures, wrong = check_run.check(found, 8)
    assert figures["tokens_per_second"] == 5.0
    assert (wrong == []) if sentence is None else (sentence in wrong[0])


def test_each_part_has_its_limit_and_its_line(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("""#!/bin/sh
case "$1 $2" in */probe.py*) sleep 60 ;; "-m pytest") exit 3 ;; esac
echo "$@"
""")
    (tmp_path / "python").chmod(0o755)
    out = tmp_path / "out"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LIMIT_PROBE": "1",
                                "PARTS": "environment probe tests step", "CANDIDATES": "ours stock"}
    done = subprocess.run(["bash", "benchmarks/gpu/first_run.sh", f"{out}/"], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    parts = json.loads((out / "summary.json").read_text())["parts"]
    assert [(one["part"], one["status"]) for one in parts] == [("environment", 0), ("probe", 124), ("tests", 3),
                                                              ("step", 0)]
    assert (out / "step.txt").read_text() == f"benchmarks/train_step.py --only ours stock --json {out}/step.json\n"
    assert "probe: FAILED with 124" in done.stdout
    assert f"2 part(s) failed. To send: {out}.tar.gz" in done.stdout
    with tarfile.open(f"{out}.tar.gz") as sent:
        assert {"out/summary.json", "out/probe.txt", "out/step.txt"} < set(sent.getnames())
