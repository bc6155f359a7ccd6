"""`evaluate` as it is typed: it starts its ranks, writes a report, goes on, and says what is wrong before any of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.adapters import write_adapter
from helpers.mmlu import write_mmlu
from helpers.models import tiny_hf_mixtral

from examples.quickstart.hf_tokenizer import write_hf_tokenizer
from megatron_mixtral.weights import convert, open_sink, open_source
from megatron_mixtral.weights.edits import MergedSource

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, *argv: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run([sys.executable, str(ROOT / "tools" / "evaluate_mixtral.py"), "--load", "hf", *argv],
                          cwd=folder, env=environment | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}, text=True,
                          capture_output=True, timeout=600)


def test_a_report_from_two_ranks(tmp_path: Path) -> None:
    tiny_hf_mixtral(tmp_path / "hf", vocab_size=32000, max_position_embeddings=512)
    write_hf_tokenizer(tmp_path / "hf")
    write_mmlu(tmp_path / "mmlu", ["anatomy", "sociology"])
    done = run(tmp_path, "--data-path", "mmlu/test/", "--output", "out", "--tensor-model-parallel-size", "2",
               "--limit", "3", "--log-samples")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "starting 2 ranks on this machine" in done.stderr and "2 of 2 tasks" in done.stderr
    whole = json.loads((tmp_path / "out/results.json").read_text())
    assert whole["n-samples"]["mmlu"]["effective"] == 6 and whole["n-shot"]["mmlu_anatomy"] == 5
    assert whole["config"]["bos_id"] == 1 and whole["config"]["dtype"] == "float32"
    assert whole["tokens"]["requests"] == 24 and whole["tokens"]["requested"] > 8 * whole["tokens"]["read"]
    assert done.stdout == (tmp_path / "out/table.md").read_text() and "| MMLU | 6 |  | " in done.stdout
    assert len((tmp_path / "out/samples/mmlu_anatomy.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_with_adapters_it_is_the_merged_model(tmp_path: Path) -> None:
    """The same figures, and not the base's; finished tasks of the base are not taken for those with adapters."""
    tiny_hf_mixtral(tmp_path / "hf", vocab_size=32000, max_position_embeddings=512)
    write_hf_tokenizer(tmp_path / "hf")
    write_mmlu(tmp_path / "mmlu", ["anatomy", "sociology"])
    write_adapter(tmp_path / "adapter", tmp_path / "hf")
    merged = MergedSource(open_source(tmp_path / "hf"), open_source(tmp_path / "adapter"))
    convert(merged, open_sink(tmp_path / "merged", template=tmp_path / "hf"))
    common = ["--data-path", "mmlu/test/", "--limit", "3", "--log-samples"]
    for name, more in {"base": [], "adapted": ["--adapter", "adapter"], "merged": ["--load", "merged"]}.items():
        done = run(tmp_path, *common, "--output", name, *more)
        assert done.returncode == 0, done.stderr[-3000:]
    base, adapted, whole = (scores(tmp_path / name) for name in ("base", "adapted", "merged"))
    assert adapted == pytest.approx(whole, abs=1e-4) and adapted != pytest.approx(base, abs=1e-2)
    done = run(tmp_path, *common, "--output", "base", "--adapter", "adapter", "--resume")
    assert done.returncode == 1 and "adapter: None then, 'adapter' now" in done.stderr


def scores(output: Path) -> list[float]:
    """Log-probabilities of all answers."""
    return [float(one[0][0]) for file in sorted((output / "samples").glob("*.jsonl"))
            for line in file.read_text().splitlines() for one in json.loads(line)["resps"]]


def test_damaged_questions_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    write_mmlu(tmp_path / "mmlu", ["anatomy"])
    (tmp_path / "mmlu/test/anatomy_test.csv").write_text("q,a,b,c,d,A\nq,a,b\n")
    done = run(tmp_path, "--data-path", "mmlu/test/", "--output", "out", "--tensor-model-parallel-size", "2")
    assert (done.returncode, done.stdout) == (1, "") and not (tmp_path / "out").exists()
    assert done.stderr == ("error: mmlu/test/anatomy_test.csv, line 2: 3 fields, expected 6: a question, four choices "
                           "and the letter of the right one\n")
