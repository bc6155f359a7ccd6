"""What cannot work is refused before the first step: the sentence, and within five seconds of processor time."""

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.datasets import write_dataset

from megatron_mixtral.config import CONFIG_FILE, preset
from megatron_mixtral.disk import human_size
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.planning import CacheShape, RunShape, stage_memory
from megatron_mixtral.training import preflight
from megatron_mixtral.training.arguments import resolve

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--model", "tiny", "--seq-length", "64", "--micro-batch-size", "1", "--train-iters", "2"]
SECONDS = 5.0


def refused(argv: list[str], world: int = 1) -> str:
    """The sentence with which the program ends; fails if it took longer than `SECONDS` of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    tool = [sys.executable, str(ROOT / "tools" / "pretrain_mixtral.py"), "--nproc", str(world)]
    done = subprocess.run([*tool, *argv], capture_output=True, text=True, check=False, env={"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS
    return done.stderr


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_dataset(tmp_path / "corpus_text_document", vocab_size=96, documents=8)


@pytest.mark.parametrize(("argv", "world", "sentence"), [
    ([*TINY, "--expert-model-parallel-size", "3"], 3, "num_local_experts 8 is not divisible by ep 3"),
    ([*TINY, "--seq-length", "8192"], 1, "--seq-length 8192 is longer than the model's max_position_embeddings 4096"),
    ([*TINY, "--global-batch-size", "3"], 2, "--global-batch-size 3 is not a multiple of"),
    ([*TINY, "--data-path", "nowhere"], 1, "nowhere.bin does not exist"),
    ([*TINY], 1, "no data are given: expected --data-path PREFIX"),
    ([*TINY, "--data-args-path", "nowhere"], 1, "--data-args-path nowhere: cannot be read"),
    ([*TINY, "--mock-data", "--wandb-project", "x"], 1, "--wandb-project x needs wandb, which is not installed"),
    (["--model", "mixtral-8x22b", "--seq-length", "64", "--micro-batch-size", "1", "--mock-data"], 1,
     "the run does not fit"),
])
def test_layouts_batches_and_memory(argv: list[str], world: int, sentence: str) -> None:
    assert sentence in refused(argv, world)


def test_data_sets(prefix: str) -> None:
    assert "8 documents; one sample needs 4097" in refused([*TINY, "--seq-length", "4096", "--data-path", prefix])
    Path(prefix + ".bin").write_bytes(b"")
    assert "the two files are not of one data set" in refused([*TINY, "--data-path", prefix])


def test_a_data_set_of_another_vocabulary(tmp_path: Path) -> None:
    large = write_dataset(tmp_path / "large_text_document", vocab_size=60000, documents=8)
    assert "the model's vocabulary has 32000; it was written with another tokenizer" in refused(
        [*TINY, "--data-path", large])


def test_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text(preset("mixtral-4x7b").to_json())
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    assert "they are different models" in refused([*TINY, "--load", str(tmp_path)])
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps({**preset("tiny").to_hf_dict(), "model_type": "qwen2"}))
    assert "(mistral, llama, internlm2), found 'qwen2'" in refused([*TINY, "--hf-checkpoint", str(hf)])


def shape(argv: list[str]) -> RunShape:
    found = preflight.shape_of(resolve(argv, {}))
    assert found is not None
    return found


def test_no_room_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [*TINY, "--bf16", "--save", str(tmp_path / "not" / "yet"), "--save-interval", "9"]
    need = preset("tiny").total_parameters * 14
    monkeypatch.setattr(preflight, "free_space", lambda path: need - 1)
    with pytest.raises(ConfigError, match=r"needs 195 MB \(0.01 G parameters x 14 bytes\) and .* has 195 MB free"):
        preflight.check_disk(resolve(argv, {}), shape(argv))
    without = [*argv, "--no-save-optim"]
    preflight.check_disk(resolve(without, {}), shape(without))


def test_memory_that_may_not_suffice_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    run = shape(["--model", "tiny", "--seq-length", "4096", "--micro-batch-size", "4"])
    fixed = run.config.total_parameters * 16
    preflight.check_memory(run, fixed + 1)
    assert "likely to run out of memory" in caplog.text
    with pytest.raises(ConfigError, match="the run does not fit: a device of stage 0 needs"):
        preflight.check_memory(run, fixed - 1)
    caplog.clear()
    cached = dataclasses.replace(run, cache=CacheShape(8, 4096))
    cache = stage_memory(cached, 0).evaluation_cache
    preflight.check_memory(cached, fixed + cache)
    assert f"and {human_size(cache)} for the cache of --eval-tasks or --evaluation-prompts a device of" in caplog.text
    with pytest.raises(ConfigError, match="for the optimizer . .* for the cache of --eval-tasks or --evaluation-prompts"
                       ".*leave these out and measure its checkpoints with tools/evaluate_mixtral.py, or raise"):
        preflight.check_memory(cached, fixed + cache - 1)
