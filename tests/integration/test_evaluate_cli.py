"""`evaluate` as it is typed: it starts its ranks, writes a report, goes on, and says what is wrong before any of it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.adapters import write_adapter
from helpers.mmlu import write_mmlu, write_task
from helpers.models import tiny_hf_mixtral
from helpers.ranks import RankError, run_ranks
from helpers.vocabularies import write_letters

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


def evaluate(rank: int, folder: str, words: str, dies_at: str) -> int:
    """The command in one process, which is killed when it is to give a file its name."""
    from megatron_mixtral import __main__ as commands

    def watch(event: str, arguments: tuple) -> None:
        if event == "os.rename" and dies_at and str(arguments[1]).endswith(dies_at):
            os.kill(os.getpid(), signal.SIGKILL)

    os.chdir(folder)
    sys.addaudithook(watch)
    return commands.run("evaluate", ["--load", "hf", "--tasks", "mmlu,after", "--data-path", "mmlu", "--include-path",
                                     "tasks", "--reference", "reference.json", "--limit", "3", *words.split()])


def test_a_killed_evaluation_goes_on_and_gives_the_same_files(tmp_path: Path) -> None:
    write_letters(tiny_hf_mixtral(tmp_path / "hf"))
    write_mmlu(tmp_path / "mmlu", ["anatomy", "sociology"])
    write_task(tmp_path / "tasks")
    known = {"results": {"after": {"acc,none": 0.1234}}, "groups": {"mmlu": {"acc,none": 0.5678}}}
    (tmp_path / "reference.json").write_text(json.dumps(known))
    assert run_ranks(1, evaluate, str(tmp_path), "--output whole", "") == [0]
    with pytest.raises(RankError, match="rank 0 died"):
        run_ranks(1, evaluate, str(tmp_path), "--output killed", "mmlu_sociology.json")
    assert [path.name for path in (tmp_path / "killed/parts").glob("*.json")] == ["mmlu_anatomy.json"]
    assert not [*(tmp_path / "killed").glob("*.*")], "no report of one half"
    first = (tmp_path / "killed/parts/mmlu_anatomy.json").stat().st_mtime_ns
    assert run_ranks(1, evaluate, str(tmp_path), "--output killed --resume", "") == [0]
    assert (tmp_path / "killed/parts/mmlu_anatomy.json").stat().st_mtime_ns == first, "kept, not asked again"
    parts = [f"parts/{name}.json" for name in ("mmlu_anatomy", "mmlu_sociology", "after")]
    for name in ("results.json", "table.md", *parts):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    whole, table = json.loads((tmp_path / "whole/results.json").read_text()), (tmp_path / "whole/table.md").read_text()
    assert {name: one["effective"] for name, one in whole["n-samples"].items()}.items() >= {
        "mmlu": 6, "mmlu_anatomy": 3, "mmlu_sociology": 3, "after": 3}.items()
    assert "| MMLU | 6 | 0.5678 | " in table and "| after (acc) | 3 | 0.1234 | " in table
    assert "Only the first 3 questions of each task were asked (--limit)." in table
    assert run_ranks(1, evaluate, str(tmp_path), "--output other --resume --limit 2 --tasks after", "") == [1], \
        "MMLU's folder, and mmlu is not among the tasks"
    assert not (tmp_path / "other").exists()


def evaluate_until_killed(rank: int, folder: str, words: str, dying: int) -> int:
    """The same, of several ranks, one of which is killed at its first step after a task is finished."""
    from megatron_mixtral.inference.engine import Engine

    step = Engine.step

    def watched(engine: Engine) -> Any:
        if rank == dying and [*Path(folder, "killed", "parts").glob("*.json")]:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(engine)

    Engine.step = watched
    return evaluate(rank, folder, words, "")


@pytest.mark.slow
@pytest.mark.parametrize("dying", [0, 1])
def test_an_evaluation_of_which_a_rank_was_killed_goes_on(dying: int, tmp_path: Path) -> None:
    write_letters(tiny_hf_mixtral(tmp_path / "hf"))
    write_mmlu(tmp_path / "mmlu", ["anatomy", "sociology"])
    write_task(tmp_path / "tasks")
    (tmp_path / "reference.json").write_text('{"results": {"after": {"acc,none": 0.1234}}}')
    words = "--tensor-model-parallel-size 2 --output"
    assert run_ranks(2, evaluate_until_killed, str(tmp_path), f"{words} whole", -1) == [0, 0]
    with pytest.raises(RankError, match=f"rank {dying} died"):
        run_ranks(2, evaluate_until_killed, str(tmp_path), f"{words} killed", dying)
    # A rank that waits inside of a step for rank 0 makes that one still.
    assert len([*(tmp_path / "killed/parts").glob("*.json")]) in (1, 2) and not [*(tmp_path / "killed").glob("*.*")]
    assert run_ranks(2, evaluate_until_killed, str(tmp_path), f"{words} killed --resume", -1) == [0, 0]
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file())
    assert len(files) == 5
    for name in files:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
