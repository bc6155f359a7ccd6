"""What is shown of a run: its steps as they come, whether it lives, what is wrong; on the page and in the terminal."""

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from helpers.events import until
from helpers.watched import RUN, step, write

from megatron_mixtral import __main__ as commands
from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.training import watch
from megatron_mixtral.training.checkpoints import lease
from megatron_mixtral.training.watch.terminal import spark, table


def watched(folder: Path) -> watch.WatchedRun:
    run = watch.WatchedRun(folder, "run")
    run.update()
    return run


def test_steps_are_read_as_they_come(tmp_path: Path) -> None:
    """Half a line is read when it is whole; a resumed run takes back the steps that it makes again."""
    write(tmp_path, step(1), step(2))
    run = watched(tmp_path)
    assert run.view()["steps"] == [1, 2] and run.last["iteration"] == 2
    whole = json.dumps(step(3, loss=1.5)) + "\n"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(whole[:40])
        file.flush()
        run.update()
        assert run.last["iteration"] == 2
        file.write(whole[40:])
    run.update()
    assert run.last["lm_loss"] == 1.5
    write(tmp_path, step(4), step(2, loss=7.0))
    run.update()
    assert run.view()["steps"] == [1, 2] and run.view()["curves"]["lm_loss"] == [2.0, 7.0]


def test_a_file_that_began_anew_is_read_anew(tmp_path: Path) -> None:
    write(tmp_path, *map(step, range(1, 9)))
    run = watched(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step(1, loss=9.0)) + "\n")
    run.update()
    assert run.view()["steps"] == [1] and run.last["lm_loss"] == 9.0


def test_a_long_curve_is_thinned_and_keeps_its_end(tmp_path: Path) -> None:
    write(tmp_path, *map(step, range(1, 5002)))
    shown = watched(tmp_path).view()["steps"]
    assert len(shown) <= 1000 and shown[0] == 1 and shown[-1] == 5001


def test_a_run_is_running_then_died_or_ended(tmp_path: Path) -> None:
    """By the lease that it holds: while its process lives; after kill -9; after an end of its own, early or not."""
    write(tmp_path, step(1))
    for end in ("kill", "return"):
        process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "held\n"
        assert watched(tmp_path).state()[0] == "running"
        if end == "kill":
            process.kill()
            process.wait()
            until(lambda: watched(tmp_path).state()[0] == "died", "for the death to be seen")
            until(lambda: not (tmp_path / lease.NAME).exists(), "for the lease to be given back")
            assert watched(tmp_path).state()[0] == "died" and str(process.pid) in watched(tmp_path).state()[1]
        else:
            process.communicate()
            assert watched(tmp_path).state()[0] == "stopped"
    write(tmp_path, step(2, left=0.0))
    assert watched(tmp_path).state()[0] == "finished"


def test_a_run_on_another_machine_lives_while_its_beats_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, step(1))
    run, beats, now = watched(tmp_path), [b"1"], [0.0]
    monkeypatch.setattr(lease, "look", lambda folder: lease.Sight("process 1 on far", None, beats[0]))
    assert run.state(lambda: now[0])[0] == "running"
    now[0] = lease.STILL - 1
    beats[0] = b"2"
    assert run.state(lambda: now[0])[0] == "running"
    now[0] += lease.STILL + 1
    assert run.state(lambda: now[0])[0] == "died"


@pytest.mark.parametrize(("steps", "alert"), [
    ([step(n, loss=None if n > 28 else 2.0) for n in range(1, 31)], "diverging: 2 of the last 20 steps are not finite"),
    ([step(n, loss=2.0 if n < 41 else 3.5) for n in range(1, 81)], "diverging: the loss is 1.50 above its lowest"),
    ([step(n, expert_imbalance_worst=5.0) for n in range(1, 4)], "experts: the busiest of layer 3 has 5.0 times"),
    ([*map(step, range(1, 9)), step(9, step_seconds=3.0)], "slow: the last step took 3.0 times the usual"),
    ([step(n) for n in range(1, 31)], None),
])
def test_what_is_wrong_is_said(steps: list[dict], alert: str | None, tmp_path: Path) -> None:
    write(tmp_path, *steps)
    found = watched(tmp_path).alerts()
    assert found == [] if alert is None else len(found) == 1 and found[0].startswith(alert), found


def test_a_run_without_a_step_for_long_is_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, step(1))
    run = watched(tmp_path)
    later = (tmp_path / "metrics.jsonl").stat().st_mtime + 300
    assert run.alerts(lambda: later) == []  # it is not running
    monkeypatch.setattr(lease, "look", lambda folder: lease.Sight("process 1", True, b""))
    assert run.alerts(lambda: later) == ["quiet: no step for 5 minutes"]


def test_the_table_of_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, *(step(n, loss=None if n == 5 else 4.0 / n) for n in range(1, 9)))
    lines = table([watched(tmp_path).view()], 80)
    assert lines[0].startswith("run: stopped") and all(len(line) <= 80 for line in lines)
    assert lines[1] == "  step 8  loss 0.5000  left 0:00:10  TGS 100  norm 1  memory 1.0 GiB"
    assert lines[2] == "  █▄▂▂x▁▁▁"
    assert "1 of the last 8 steps are not finite" in lines[3]
    assert commands.run("watch", [str(tmp_path), "--once"]) == 0
    assert "step 8" in capsys.readouterr().out
    assert len(spark([1.0, 2.0] * 500, 40)) <= 40 and spark([None], 10) == "x"


def test_the_page_and_what_it_shows(tmp_path: Path) -> None:
    write(tmp_path, step(1))
    with watch.serve([watch.WatchedRun(tmp_path, "run")], "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        with urllib.request.urlopen(address) as answer:
            assert answer.headers["Content-Type"].startswith("text/html") and b"runs.json" in answer.read()
        write(tmp_path, step(2))
        with urllib.request.urlopen(f"{address}/runs.json") as answer:
            (run,) = json.load(answer)
        assert run["steps"] == [1, 2] and run["state"] == "stopped"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/metrics.jsonl")
        with pytest.raises(ConfigError, match="cannot be used: Address already in use"):
            watch.serve([], "127.0.0.1", server.server_address[1])
        server.shutdown()


def test_the_command_ends_by_a_signal(tmp_path: Path) -> None:
    write(tmp_path, step(1))
    command = [sys.executable, "-m", "megatron_mixtral", "watch", str(tmp_path), "--page", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("http://127.0.0.1:")
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == 130 and process.stderr.read() == "interrupted\n"


def test_a_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="metrics.jsonl is not there"):
        watch.WatchedRun(tmp_path, "run")
