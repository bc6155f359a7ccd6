"""tools/checkpoint/inspect_checkpoint.py on every format, on damaged ones, and on what killed conversions leave."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.models import TINY, random_hf_directory

from megatron_mixtral.config import MixtralConfig, ParallelLayout
from megatron_mixtral.weights import cli
from megatron_mixtral.weights.convert import convert
from megatron_mixtral.weights.dist_sink import DistSink
from megatron_mixtral.weights.hf import HFSource
from megatron_mixtral.weights.inspection import inspect
from megatron_mixtral.weights.rank_sink import RankDirSink
from megatron_mixtral.weights.rules import hf_tensors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return random_hf_directory(tmp_path_factory.mktemp("hf") / "hf", MixtralConfig(**TINY), torch.bfloat16)


def test_every_format_is_known(hf, tmp_path):
    source = HFSource(hf)
    count = len(hf_tensors(source.config))
    convert(source, RankDirSink(tmp_path / "mg", source.config, ParallelLayout(tp=2, pp=2)), verify=True)
    convert(source, DistSink(tmp_path / "dist", source.config), verify=True)
    for directory, words in ((hf, "Hugging Face, whole"), (tmp_path / "mg", "layout: tp2-pp2-ep1"),
                             (tmp_path / "dist", "(torch_dist), whole")):
        said = str(inspect(directory, deep=True))
        assert words in said and "num_hidden_layers 4" in said
        assert f"{count} Hugging Face tensors ({count} bfloat16)" in said
        assert (f"{count} checksums equal" in said) == (directory != hf)


def test_the_program_says_what_is_wrong(hf, tmp_path):
    source = HFSource(hf)
    convert(source, RankDirSink(tmp_path / "mg", source.config, ParallelLayout(tp=2)), verify=True)
    path = tmp_path / "mg/release/mp_rank_01/model_optim_rng.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4  # in the middle of some tensor: only its checksum can tell
    path.write_bytes(data)
    assert inspect(tmp_path / "mg").problem is None
    assert "not what the conversion wrote" in inspect(tmp_path / "mg", deep=True).problem
    path.write_bytes(data[:-1000])
    done = subprocess.run([sys.executable, str(ROOT / "tools/checkpoint/inspect_checkpoint.py"), str(tmp_path / "mg")],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "NOT WHOLE" in done.stdout and str(path) in done.stdout
    assert "not a Megatron checkpoint" in inspect(tmp_path).problem
    assert "does not exist" in inspect(tmp_path / "absent").problem


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills):
    """Never a directory that looks whole and is not; the next start always succeeds."""
    config = MixtralConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
                           num_key_value_heads=4, num_local_experts=4, vocab_size=1000)
    hf = random_hf_directory(tmp_path / "hf", config, torch.bfloat16)
    arguments = ["--loader", "mixtral_hf", "--load-dir", str(hf), "--save-dir", str(tmp_path / "mg"), "--verify",
                 "--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "4"]
    code = ("import sys; from megatron_mixtral.weights import cli, dist_sink, rank_sink; print('go', flush=True); "
            "cli.util(sys.argv[1:])")
    draw = random.Random(3)
    for number in range(kills):
        process = subprocess.Popen([sys.executable, "-c", code, *arguments, "--resume"], stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
        process.stdout.readline()
        time.sleep(draw.uniform(0.0, 0.25))
        process.kill()
        process.wait()
        process.stdout.close()
        for directory in (tmp_path / "mg", tmp_path / ".mg.partial"):
            found = inspect(directory, deep=directory.name == "mg")
            assert found.problem is not None or (directory.name == "mg" and found.checksums), f"kill {number}: {found}"
        if (tmp_path / "mg").exists():
            (tmp_path / "mg").rename(tmp_path / f"whole{number}")
    cli.util([*arguments, "--resume"])
    assert inspect(tmp_path / "mg", deep=True).problem is None
    assert not (tmp_path / ".mg.partial").exists()
