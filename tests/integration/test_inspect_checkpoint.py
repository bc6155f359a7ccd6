"""tools/checkpoint/inspect_checkpoint.py on every format, on damaged ones, and on what killed conversions leave."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.events import HANG
from helpers.models import TINY, random_hf_directory

from megatron_mixtral.config import MixtralConfig, ParallelLayout
from megatron_mixtral.weights import cli, convert, hf_tensors, open_source
from megatron_mixtral.weights.conversion import compare
from megatron_mixtral.weights.formats import DistSink, HFSink, HFSource, RankDirSink
from megatron_mixtral.weights.inspection import inspect

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return random_hf_directory(tmp_path_factory.mktemp("hf") / "hf", MixtralConfig(**TINY), torch.bfloat16)


def test_every_format_is_known(hf, tmp_path):
    source = HFSource(hf)
    count = len(hf_tensors(source.config))
    convert(source, RankDirSink(tmp_path / "mg", ParallelLayout(tp=2, pp=2)), verify=True)
    convert(source, DistSink(tmp_path / "dist"), verify=True)
    for directory, words in ((hf, "Hugging Face, whole"), (tmp_path / "mg", "layout: tp2-pp2-ep1"),
                             (tmp_path / "dist", "(torch_dist), whole")):
        said = str(inspect(directory, deep=True))
        assert words in said and "num_hidden_layers 4" in said
        assert f"{count} Hugging Face tensors ({count} bfloat16)" in said
        assert (f"{count} checksums equal" in said) == (directory != hf)


def test_the_program_says_what_is_wrong(hf, tmp_path):
    source = HFSource(hf)
    convert(source, RankDirSink(tmp_path / "mg", ParallelLayout(tp=2)), verify=True)
    convert(source, HFSink(tmp_path / "hf2"), verify=True)
    path = tmp_path / "mg/release/mp_rank_01/model_optim_rng.pt"
    # In the middle of some tensor: only a checksum can tell, torch's or, where a format has none, the conversion's.
    for folder, file, said in (("mg", path, "is not what was saved"),
                               ("hf2", tmp_path / "hf2/model.safetensors", "not what the conversion wrote")):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
        assert inspect(tmp_path / folder).problem is None
        assert said in inspect(tmp_path / folder, deep=True).problem
    path.write_bytes(path.read_bytes()[:-1000])
    done = subprocess.run([sys.executable, str(ROOT / "tools/checkpoint/inspect_checkpoint.py"), str(tmp_path / "mg")],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "NOT WHOLE" in done.stdout and str(path) in done.stdout
    assert "not a Megatron checkpoint" in inspect(tmp_path).problem
    assert "does not exist" in inspect(tmp_path / "absent").problem


def whole_and_right(directory: Path, source: HFSource) -> bool:
    """Whether a directory is called whole; then its weights must be the source's."""
    if inspect(directory).problem is not None:
        return False
    compare(source, open_source(directory))
    return True


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_places(tmp_path, kills):
    """Never a directory that is called whole and has other weights than the source; the next start always succeeds.

    Every other conversion replaces a whole result, and every other next start is told to resume.
    """
    config = MixtralConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
                           num_key_value_heads=4, num_local_experts=4, vocab_size=1000)
    source = HFSource(random_hf_directory(tmp_path / "hf", config, torch.bfloat16))
    target, partial = tmp_path / "mg", tmp_path / ".mg.partial"
    arguments = ["--loader", "mixtral_hf", "--load-dir", str(tmp_path / "hf"), "--save-dir", str(target), "--verify",
                 "--overwrite", "--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "4"]
    def killed(number):
        """The conversion, killed before this change of the disk; 0: not killed."""
        command = [sys.executable, "tests/helpers/killed.py", str(number), str(tmp_path / "changes"),
                   "tools/checkpoint/util.py", *arguments]
        return subprocess.run(command, cwd=ROOT, start_new_session=True, capture_output=True, timeout=HANG).returncode

    draw, unfinished = random.Random(3), 0
    assert killed(0) == 0
    changes = int((tmp_path / "changes").read_text())
    (tmp_path / "changes").unlink()
    for number in range(kills):
        if number % 2:
            shutil.rmtree(target)
        assert killed(draw.randint(1, changes * 9 // 10)) == -9
        unfinished += partial.exists()
        assert not partial.exists() or not whole_and_right(partial, source)
        assert not target.exists() or whole_and_right(target, source)
        cli.convert([*arguments, "--resume"] if number % 4 < 2 else arguments)
        assert whole_and_right(target, source) and inspect(target, deep=True).checksums
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mg"]
    assert unfinished >= kills // 2
