"""Worker processes of instruction preprocessing: the same output for any number of them, and no run that hangs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.events import HANG

from megatron_mixtral.data.instruction import InstructionOptions, run
from megatron_mixtral.data.instruction.rendering import Renderer
from megatron_mixtral.data.instruction.run import COLUMNS, column_prefix, preprocess_instructions
from megatron_mixtral.errors import DataError
from megatron_mixtral.tokenizer import mixtral_tokenizer_path

RECORDS = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(1, n % 50 + 2)))} for n in range(900)]


def write(path: Path, bad: tuple[int, ...] = ()) -> Path:
    lines = ["not json" if n in bad else json.dumps(record) for n, record in enumerate(RECORDS)]
    path.write_text("\n".join(lines) + "\n")
    return path


def options(source: Path, name: str, workers: int, **given) -> InstructionOptions:
    return InstructionOptions((str(source),), str(source.parent / name), str(mixtral_tokenizer_path()), **{
        "tokenizer_type": "Llama2Tokenizer", "seq_length": 120, "workers": workers, **given})


@pytest.mark.parametrize("pack", [False, True])
def test_any_number_of_workers_gives_the_same_files_and_account(tmp_path, caplog, pack):
    source = write(tmp_path / "a.jsonl", bad=(3, 700, 701))
    reports, files, logs = [], [], []
    for workers in (1, 2, 3):
        caplog.clear()
        report = preprocess_instructions(options(source, f"out{workers}", workers, pack=pack, on_error="skip"))
        prefixes = [one.pop("output") for one in report["keys"].values()]
        reports.append(report)
        files.append([Path(prefix + end).read_bytes() for prefix in prefixes for end in (".bin", ".idx")])
        logs.append([record.getMessage() for record in caplog.records if "skipped /" in record.getMessage()])
    assert reports[0] == reports[1] == reports[2] and files[0] == files[1] == files[2]
    assert reports[0]["skipped"] == {"bad_json": 3} and reports[0]["too_long"] > 0
    assert reports[0]["samples"] + reports[0]["too_long"] + 3 == reports[0]["records"] == 900
    assert len(logs[0]) == 3 and logs[0] == logs[1] == logs[2]


def test_the_first_bad_record_is_told_whichever_worker_meets_it(tmp_path):
    source = write(tmp_path / "a.jsonl", bad=(300, 899))
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"a\.jsonl:301: bad_json"):
            preprocess_instructions(options(source, "out", workers))
        assert [one.name for one in tmp_path.iterdir()] == ["a.jsonl"]


class DyingRenderer(Renderer):
    """Workers find it here by its name."""

    def run(self, records):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "Renderer", DyingRenderer)
    with pytest.raises(DataError, match="A worker process died.*fewer --workers"):
        preprocess_instructions(options(write(tmp_path / "a.jsonl"), "out", 2))
    assert [one.name for one in tmp_path.iterdir()] == ["a.jsonl"]


def test_the_command_with_workers_and_an_interruption(tmp_path):
    source = write(tmp_path / "a.jsonl")
    command = [sys.executable, "tools/preprocess_data.py", "--output-prefix", str(tmp_path / "out"), "--handler-name",
               "alpaca", "--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", str(mixtral_tokenizer_path()),
               "--workers", "2"]  # fmt: skip
    root = Path(__file__).resolve().parents[4]
    subprocess.run([*command, "--input", str(source)], check=True, cwd=root, capture_output=True, timeout=HANG)
    ids = np.fromfile(column_prefix(str(tmp_path / "out"), COLUMNS[0]) + ".bin", dtype=np.int32)
    assert (ids == 1).sum() == len(RECORDS)
    many = tmp_path / "many.jsonl"
    many.write_bytes(source.read_bytes() * 200)
    process = subprocess.Popen([*command[:3], str(tmp_path / "more"), *command[4:], "--input", str(many),
                                "--log-interval", "100"], cwd=root, stderr=subprocess.PIPE, text=True)  # fmt: skip
    for line in process.stderr:
        if " records, " in line:
            break
    process.send_signal(signal.SIGTERM)
    assert "interrupted" in process.stderr.read()  # which ends when the last worker has closed its end
    assert process.wait(HANG) == 130
    assert not list(tmp_path.glob("more*"))
