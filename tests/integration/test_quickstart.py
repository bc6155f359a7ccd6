"""examples/quickstart.sh at a small size: stopped in the middle as by Ctrl-C, started again, and made to fail."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from helpers.events import HANG, until

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"STEPS": "4", "STOP_AT": "2", "MEGABYTES": "1", "SEQ_LENGTH": "64", "GLOBAL_BATCH_SIZE": "4",
         "MICRO_BATCH_SIZE": "1", "WORKERS": "1", "BELOW": "10.6", "TUNE_EPOCHS": "1", "KNOWN": "0",
         "MIXTRAL_VENV": "active"}  # fmt: skip


def start(work: Path, **more: str) -> subprocess.Popen:
    """The command, in a process group of its own, so that a signal reaches what Ctrl-C would reach."""
    environment = {**os.environ, **SMALL, "QUICKSTART_DIR": str(work), **more}
    return subprocess.Popen(["bash", "examples/quickstart.sh"], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def made(work: Path) -> dict[str, int]:
    """The files of the folder and when each was written; the stamp of the set-up is written at every start."""
    return {str(path): path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()
            and path.name not in ("set-up", ".lock")}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("quickstart") / "work"


def test_stopped_and_started_again(work):
    first = start(work, STEPS="4000", STOP_AT="2000")  # so it is certainly stopped while it trains
    log = work / "logs" / "train.log"
    until(lambda: first.poll() is not None or log.is_file() and "\nstep 1/4000 | " in log.read_text())
    assert first.poll() is None, first.communicate(timeout=HANG)[0]
    os.killpg(first.pid, signal.SIGINT)
    output, _ = first.communicate(timeout=HANG)
    assert first.returncode == 130, output
    assert "Start it again to go on" in output
    until(lambda: not alive(first.pid), "for processes that are left behind")
    assert (work / "stamps" / "convert").is_file() and not (work / "stamps" / "train").exists()

    second = start(work)
    output, _ = second.communicate(timeout=HANG)
    assert second.returncode == 0, output
    assert output.count("done before") == 4, output
    steps = [json.loads(line)["iteration"] for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    for row in ("train", "resume", "check", "nothing missing, nothing unexpected", "tokens equal transformers'",
                "asked who it is", "PEFT answers as taught", "All checks passed"):
        assert row in output
    assert (work / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (work / "exported" / "mg2hg" / "model.safetensors").is_file()


def test_third_start_has_nothing_to_do_and_a_failed_check_fails(work):
    before = made(work)
    third = start(work)
    output, _ = third.communicate(timeout=HANG)
    assert third.returncode == 0 and output.count("done before") == 12, output
    assert made(work) == before
    # A loss that the training program never logged: the comparison must notice.
    log = work / "logs" / "resume.log"
    log.write_text(re.sub(r"(evaluation after step \d+ . loss )", r"\g<1>9", log.read_text()))
    (work / "stamps" / "check").unlink()
    fourth = start(work)
    output, _ = fourth.communicate(timeout=HANG)
    assert fourth.returncode == 1, output
    assert "DIFFERENT" in output and "FAILED" in output and "All checks passed" not in output


def test_a_folder_that_is_not_its_own_is_not_removed(tmp_path):
    (tmp_path / "precious").write_text("x")
    refused = start(tmp_path, CLEAN="1")
    output, _ = refused.communicate(timeout=HANG)
    assert refused.returncode == 1 and "not made by the quickstart" in output
    assert (tmp_path / "precious").is_file()
