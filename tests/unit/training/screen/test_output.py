"""A rank's output: all of it in its file, past Python too; on the screen the lines for the user, errors last."""

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mixtral.errors import ConfigError, CrashedError
from megatron_mixtral.training.screen import WIDTH, Output

ROOT = Path(__file__).resolve().parents[4]
PROGRAM = """
import logging, os, sys
from pathlib import Path
from megatron_mixtral import __main__ as commands
from megatron_mixtral.errors import DataError
from megatron_mixtral.training.screen import Output
logging.basicConfig(level=logging.INFO, format="%(message)s")
save, rank, level, end = sys.argv[1:]
logger = logging.getLogger("megatron_mixtral.training.pretrain")

def body():
    print("argument dump")
    os.write(2, b"C++ speaks\\n")
    os.system("echo a child speaks")
    logging.getLogger("megatron.core").warning("a deprecation")
    logger.info("summary " + "of many words " * 10)
    logging.getLogger("megatron_mixtral.training.metrics.writer").info("long line of a step", extra={
        "shown": "step 1/2 | loss 3.0000", "status": "step 1/2", "step": 1, "last": 2})
    {"bad": lambda: {}["missing"], "user": lambda: exec("raise DataError('no such data')"), "well": lambda: None}[end]()

try:
    with Output(Path(save) if save else None, int(rank), level) as output:
        output.settle(lambda name: "START")
        body()
except commands.MixtralError as error:
    print(f"error: {error}", *error.__notes__ if save else (), sep="\\n", file=sys.stderr)
"""


def ran(save: Path | str, rank: int = 0, level: str = "info", end: str = "well") -> str:
    """What is on the screen."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(save), str(rank), level, end], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout


def test_the_file_has_everything_and_the_screen_the_users_lines(tmp_path: Path) -> None:
    screen = ran(tmp_path)
    log = (tmp_path / "logs" / "latest" / "rank_0.log").read_text()
    assert [line.split()[0] for line in screen.splitlines()] == ["summary", "words", "step"]
    assert max(map(len, screen.splitlines())) <= WIDTH and screen.splitlines()[-1] == "step 1/2 | loss 3.0000"
    for line in ("argument dump", "C++ speaks", "a child speaks", "a deprecation", "long line of a step"):
        assert f"{line}\n" in log, line
    assert (tmp_path / "logs" / "latest").readlink() == Path("START")
    assert not list((tmp_path / "logs").glob("starting-*"))


def test_other_ranks_show_steps_and_errors_alone(tmp_path: Path) -> None:
    assert ran(tmp_path, rank=3) == "step 1/2 | loss 3.0000\n"
    assert ran(tmp_path, rank=3, level="warning") == ""


def test_errors_come_last_with_the_name_of_the_file(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "START" / "rank_2.log"
    crashed = ran(tmp_path, rank=2, end="bad").splitlines()
    assert crashed[1:] == ["error: KeyError: 'missing'", f"log, with the traceback: {log}"]
    assert "Traceback (most recent call last)" in log.read_text() and "in body" in log.read_text()
    second = tmp_path / "logs" / "START" / "rank_2.2.log"  # what another start has written stays
    assert ran(tmp_path, rank=2, end="user").splitlines()[1:] == ["error: no such data", f"log: {second}"]
    assert "error: no such data" in second.read_text()


def test_debug_brings_everything_back_and_without_save_a_crash_keeps_its_traceback(tmp_path: Path) -> None:
    everything = ran(tmp_path, level="debug")
    assert "argument dump" in everything and "a child speaks" in everything and not (tmp_path / "logs").exists()
    lost = ran("", end="bad")
    assert "argument dump" not in lost and "Traceback" in lost and "KeyError: 'missing'" in lost


def test_the_process_is_as_it_was_afterwards_and_a_full_disk_does_not_end_it(tmp_path: Path) -> None:
    before = [os.fstat(1).st_ino, os.fstat(2).st_ino, sys.stdout, sys.stderr, logging.root.handlers[:]]
    with Output(tmp_path, 0, "info") as output:
        assert re.fullmatch(r"starting-.*-\d+\.log", output.path.name)
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1)
        os.dup2(full, 2)
        os.close(full)
        sys.stdout.write("nowhere to go\n")
    assert [os.fstat(1).st_ino, os.fstat(2).st_ino, sys.stdout, sys.stderr, logging.root.handlers[:]] == before
    assert len(list((tmp_path / "logs").glob("*/rank_0.log"))) == 1


def test_a_file_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    before = [sys.stdout, sys.stderr, logging.root.handlers[:]]
    (tmp_path / "logs").write_text("in the way")
    with pytest.raises(ConfigError, match=r"the output of rank 0 cannot be kept in \S+/logs: .* give another --save"), \
            Output(tmp_path, 0, "info"):
        pass
    assert [sys.stdout, sys.stderr, logging.root.handlers[:]] == before
    (tmp_path / "logs").unlink()
    (tmp_path / "logs" / "latest").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"rank 0 cannot be kept in .*latest"), Output(tmp_path, 0, "info") as output:
        output.settle(lambda name: name)
    assert [sys.stdout, sys.stderr, logging.root.handlers[:]] == before
    with pytest.raises(CrashedError, match="KeyError"), Output(tmp_path, 0, "info"):  # the disk fills up meanwhile
        shutil.move(tmp_path / "logs", tmp_path / "elsewhere")
        raise KeyError("lost")
