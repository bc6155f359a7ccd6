"""Runs that start from converted distributed checkpoints, and runs that go on from one converted in between."""

import contextlib
import io
from pathlib import Path

import pytest
import torch
from helpers import datasets
from helpers.models import assert_same_weights, tiny_hf_mixtral
from helpers.program import Outcome, pretrain

from megatron_mixtral.config import MixtralConfig
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.weights import cli, convert, open_source
from megatron_mixtral.weights.files.file_layout import Region
from megatron_mixtral.weights.formats import DistSink, DistSource
from megatron_mixtral.weights.formats.dist_metadata import read_contents
from megatron_mixtral.weights.formats.saved_args import common_state
from megatron_mixtral.weights.inspection import inspect

LAYOUT = ["--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2",
          "--expert-tensor-parallel-size", "1"]
RECIPE = ["--seq-length", "32", "--micro-batch-size", "1", "--global-batch-size", "4", "--lr", "3e-3",
          "--lr-decay-style", "constant", "--moe-aux-loss-coeff", "0", "--eval-iters", "0", "--train-iters", "4",
          "--use-distributed-optimizer"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def hf(folder: Path) -> Path:
    return tiny_hf_mixtral(folder / "hf", vocab_size=97)  # odd: two tensor-parallel ranks pad it


@pytest.fixture(scope="module")
def data(folder: Path) -> list[str]:
    prefix = datasets.write_dataset(folder / "corpus_text_document", vocab_size=96)
    return ["--data-path", prefix, "--split", "969, 30, 1", "--data-cache-path", str(folder / "cache")]


@pytest.fixture(scope="module")
def run(folder: Path, hf: Path, data: list[str]) -> Outcome:
    """Four steps, saved after two (and at the end) in `folder / "run"`."""
    argv = [*LAYOUT, *RECIPE, *data, "--hf-checkpoint", str(hf), "--save", str(folder / "run"), "--save-interval", "2"]
    found = pretrain(2, argv, folder / "log")
    assert found.codes == [0, 0], found.logs[-1][-3000:]
    return found


@pytest.fixture
def middle(run: Outcome, folder: Path) -> Path:
    """The run's checkpoint after two steps."""
    return folder / "run" / "iter_0000002"


def reshard(source: Path, target: Path, *more: str) -> str:
    """Convert a run's checkpoint to a distributed one; what the command says."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert cli.convert(["--loader", "mixtral_mg", "--load-dir", str(source), "--save-dir", str(target),
                            "--target-ckpt-format", "torch_dist", *more]) == 0
    return said.getvalue()


def test_a_run_goes_on_from_a_converted_checkpoint_as_from_its_own(run, middle, data, tmp_path) -> None:
    said = reshard(middle, tmp_path / "mg", "--verify")
    assert "carried along: optimizer.state.exp_avg, optimizer.state.exp_avg_sq, optimizer.state.param" in said
    assert "left behind" not in said and "checksums equal" in said
    found = pretrain(2, [*LAYOUT, *RECIPE, *data, "--load", str(tmp_path / "mg")], tmp_path / "log")
    assert found.codes == [0, 0], found.logs[-1][-3000:]
    assert sorted(found.steps) == [3, 4]
    assert found.losses(3, 4) == run.losses(3, 4) and found.norms(3, 4) == run.norms(3, 4)


def test_what_is_carried_along_is_the_same_for_the_engine(middle, tmp_path) -> None:
    """Every tensor and object, as torch's own reader sees it, and read back as weights."""
    reshard(middle, tmp_path / "mg")
    before, after = DistSource(middle).contents, DistSource(tmp_path / "mg" / "iter_0000002").contents
    assert before.tensors.keys() <= after.tensors.keys() and before.objects.keys() <= after.objects.keys()
    states = [key for key in before.tensors if key.startswith("optimizer.")] + ["embedding.word_embeddings.weight"]
    for key in states:  # in the same boxes, so that they can be compared byte by byte
        ours, theirs = after.tensors[key], before.tensors[key]
        assert (ours.size, ours.dtype) == (theirs.size, theirs.dtype) and len(ours.chunks) == len(theirs.chunks)
        for one, other in zip(ours.chunks, theirs.chunks, strict=True):
            assert (one.offsets, one.sizes) == (other.offsets, other.sizes)
            assert b"".join(one.region.blocks()) == b"".join(other.region.blocks())
    from torch.distributed.checkpoint import FileSystemReader

    read = FileSystemReader(tmp_path / "mg" / "iter_0000002").read_metadata().state_dict_metadata
    assert all(read[key].size == torch.Size(before.tensors[key].size) for key in before.tensors)
    for source, target in ((middle, "one"), (tmp_path / "mg", "other")):
        cli.convert(["--loader", "mixtral_mg", "--load-dir", str(source), "--save-dir", str(tmp_path / target),
              "--save-model-type", "huggingface"])
    assert_same_weights(tmp_path / "one" / "mg2hg", tmp_path / "other" / "mg2hg")
    found = inspect(tmp_path / "mg", deep=True)
    assert found.problem is None and found.iteration == "2" and "optimizer.state.exp_avg" in found.left_behind


def test_a_state_is_named_when_it_is_left_behind(middle, tmp_path) -> None:
    for more in (["--no-load-optim"], ["--no-load-optim", "--params-dtype", "bf16"], ["--target-ckpt-format", "torch"]):
        said = reshard(middle, tmp_path / "mg", "--overwrite", *more)
        assert "left behind, because only weights are converted here: optimizer.state.exp_avg, " in said
        assert "begins at step 0 with a new optimizer" in said
        assert (tmp_path / "mg" / "latest_checkpointed_iteration.txt").read_text() == "release"
    source = open_source(middle)
    assert isinstance(source, DistSource)
    report = convert(source, DistSink(tmp_path / "weights", carry_state=False))
    assert report.carried == [] and report.left_behind == source.left_behind


def test_what_would_tear_weights_and_state_apart_is_refused(middle, tmp_path) -> None:
    for more in (["--params-dtype", "bf16"], ["--make-vocab-size-divisible-by", "128"]):
        with pytest.raises(ConfigError, match=f"{more[0]} changes weights .* give --no-load-optim"):
            reshard(middle, tmp_path / "mg", *more)
    reshard(middle, tmp_path / "mg", "--make-vocab-size-divisible-by", "2")  # 98 rows, as the run has
    moved = middle.rename(middle.parent / "elsewhere")
    try:
        with pytest.raises(CheckpointError, match="not the iter_NNNNNNN of a run .* --no-load-optim"):
            reshard(moved, tmp_path / "other")
    finally:
        moved.rename(middle)
    source = open_source(middle)
    key = "optimizer.state.exp_avg.decoder.layers.mlp.router.weight"
    source.contents.tensors[key.replace("layers.", "layers.0.")] = source.contents.tensors.pop(key)
    with pytest.raises(CheckpointError, match="stored layer by layer"):
        convert(source, DistSink(tmp_path / "other"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mg"]


def test_damage_to_what_was_carried_along_is_noticed(middle, tmp_path, monkeypatch) -> None:
    key = "optimizer.state.exp_avg_sq.decoder.layers.mlp.router.weight"
    due = [DistSource(middle).contents.tensors[key].chunks[0].region]
    read = Region.blocks

    def flip_once(region):
        for block in read(region):
            half = len(block) // 2
            yield block if region not in due else block[:half] + bytes([block[half] ^ 1]) + block[half + 1:]
        due[:] = [left for left in due if left != region]

    monkeypatch.setattr(Region, "blocks", flip_once)
    with pytest.raises(CheckpointError, match=r"__1_0.distcp: bytes \d+ to .* are not those of .* when read back"):
        reshard(middle, tmp_path / "mg", "--verify")
    assert not (tmp_path / "mg").exists()


def test_the_engines_own_norm_key_is_given_the_converters(middle, tmp_path) -> None:
    """A run with the engine's own layers stores the norm before the experts, and its state, under another key."""
    source = open_source(middle)
    ours, theirs = "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
    for key in [key for key in source.contents.tensors if key.endswith(ours)]:
        source.contents.tensors[key.removesuffix(ours) + theirs] = source.contents.tensors.pop(key)
    convert(source, DistSink(tmp_path / "mg"))
    written = DistSource(tmp_path / "mg" / "iter_0000002").contents.tensors
    for prefix in ("", "optimizer.state.exp_avg_sq."):
        assert written[f"{prefix}decoder.layers.{ours}"] == written[f"{prefix}decoder.layers.{theirs}"]
    back = open_source(tmp_path / "mg")
    back.contents.tensors[f"decoder.layers.{theirs}"] = back.contents.tensors["decoder.layers.mlp.router.weight"]
    with pytest.raises(CheckpointError, match="pre_mlp_layernorm is stored twice"):
        back.check()


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
def test_a_run_starts_from_converted_weights_by_themselves(flag, run, hf, data, tmp_path) -> None:
    """No --finetune, --no-load-optim or --no-load-rng: a converted checkpoint says that it has none of these."""
    cli.convert(["--loader", "mixtral_hf", "--load-dir", str(hf), "--save-dir", str(tmp_path / "mg"),
          "--target-ckpt-format", "torch_dist"])
    argv = [*RECIPE, *data, flag, str(tmp_path / "mg"), "--exit-interval", "1", "--make-vocab-size-divisible-by", "2"]
    found = pretrain(1, argv, tmp_path / "log")
    assert found.codes == [0], found.logs[-1][-3000:]
    assert "without an optimizer: begins at step 0" in found.logs[0]
    assert found.losses(1) == pytest.approx(run.losses(1), rel=1e-6)
    assert MixtralConfig.from_checkpoint(tmp_path / "mg") == MixtralConfig.from_hf_dir(hf)


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_arguments_of_a_converted_checkpoint_leave_the_experts_as_they_are(form, run, hf, data, tmp_path) -> None:
    """--use-checkpoint-args brings the padding of the vocabulary along, and not the kind of experts."""
    cli.convert(["--loader", "mixtral_hf", "--load-dir", str(hf), "--save-dir", str(tmp_path / "mg"),
          "--target-ckpt-format", form, "--make-vocab-size-divisible-by", "2"])
    argv = [*RECIPE, *data, "--load", str(tmp_path / "mg"), "--use-checkpoint-args", "--exit-interval", "1",
            "--save", str(tmp_path / "save"), "--save-interval", "1"]
    found = pretrain(1, argv, tmp_path / "log")
    assert found.codes == [0], found.logs[-1][-3000:]
    assert found.losses(1) == pytest.approx(run.losses(1), rel=1e-6)
    saved = tmp_path / "save" / "iter_0000001"
    args = common_state(saved, read_contents(saved))[0]["args"]
    assert args.use_checkpoint_args and args.moe_grouped_gemm and args.padded_vocab_size == 98
