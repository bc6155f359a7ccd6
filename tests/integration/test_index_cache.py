"""`tools/build_index_cache.py` builds what a run then looks for; a data set that is written again gets a new index."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import datasets
from helpers.program import pretrain

from megatron_mixtral.data.datasets.index_cache import cache_folder
from megatron_mixtral.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--model", "tiny", "--tensor-model-parallel-size", "2", "--seq-length", "32", "--micro-batch-size", "1",
         "--global-batch-size", "4", "--lr", "1e-3", "--train-iters", "2", "--eval-iters", "1", "--eval-interval", "2"]


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def build(flags: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "tools/build_index_cache.py", *flags], cwd=ROOT, text=True,
                          capture_output=True, timeout=600, env={**os.environ, "WORLD_SIZE": "2"})  # fmt: skip


@pytest.mark.parametrize("kind", ["one blend", pytest.param("per split", marks=pytest.mark.slow)])
def test_a_run_finds_the_cache(tmp_path: Path, kind: str) -> None:
    a, b = (datasets.write_dataset(tmp_path / f"{name}_text_document", vocab_size=96, documents=400, seed=seed)
            for seed, name in enumerate("ab"))
    if kind == "one blend":
        cache = tmp_path / "cache"
        data = ["--data-path", "0.6", a, "0.4", b, "--split", "900,50,50", "--data-cache-path", str(cache)]
    else:
        cache = Path(f"{a}_index_cache")
        data = ["--train-data-path", a, b, "--valid-data-path", "1", b, "--test-data-path", a]
    done = build([*FLAGS, *data])
    assert done.returncode == 0, done.stderr[-2000:]
    built = files(cache)
    assert any("train-shuffle_index" in name for name in built) and any("valid-sample" in name for name in built)
    assert any("BlendedDataset-train" in name for name in built)
    outcome = pretrain(2, [*FLAGS, *data], tmp_path / "run")
    assert outcome.codes == [0, 0], outcome.logs[-1][-2000:]
    assert files(cache) == built, "the run built an index of its own"


def test_missing_data_are_refused(tmp_path: Path) -> None:
    done = build([*FLAGS, "--data-path", str(tmp_path / "x")])
    assert done.returncode == 1 and "does not exist" in done.stderr and "Traceback" not in done.stderr


def test_a_data_set_written_again_has_another_folder(tmp_path: Path) -> None:
    prefix = datasets.write_dataset(tmp_path / "a_text_document", vocab_size=96, seed=1)
    first = cache_folder(str(tmp_path / "cache"), [prefix])
    assert first == cache_folder(str(tmp_path / "cache"), [prefix, prefix]) and Path(first).parent == tmp_path / "cache"
    for end in (".bin", ".idx"):
        os.utime(prefix + end)  # a copy has other times, and the same index
    assert cache_folder(str(tmp_path / "cache"), [prefix]) == first
    assert cache_folder(None, [prefix]) == f"{prefix}_index_cache/{Path(first).name}"
    shutil.rmtree(f"{prefix}.scratch", ignore_errors=True)
    datasets.write_dataset(tmp_path / "a_text_document", vocab_size=96, seed=2)
    assert cache_folder(str(tmp_path / "cache"), [prefix]) != first
    assert cache_folder(None, []) is None
    Path(prefix + ".idx").write_bytes(b"torn")
    with pytest.raises(DataError, match="is not the index"):
        cache_folder(None, [prefix])
