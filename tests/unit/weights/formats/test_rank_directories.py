"""Rank directories: round trips through every kind of layout, what a file holds, and what is refused."""

import argparse
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from helpers.models import TINY, assert_same_weights, random_hf_directory, tensors_of, tiny_hf_mixtral

from megatron_mixtral.config import MixtralConfig, ParallelLayout
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.weights.conversion import convert
from megatron_mixtral.weights.formats import rank_source
from megatron_mixtral.weights.formats.hf_sink import HFSink
from megatron_mixtral.weights.formats.hf_source import HFSource
from megatron_mixtral.weights.formats.rank_sink import RankDirSink
from megatron_mixtral.weights.formats.rank_source import RankDirSource
from megatron_mixtral.weights.opening import open_source
from megatron_mixtral.weights.rules import hf_tensors

LAYOUTS = {
    "tp1": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "ep2": {"ep": 2}, "tp2-pp2": {"tp": 2, "pp": 2},
    "pp2-ep2": {"pp": 2, "ep": 2}, "tp2-ep2": {"tp": 2, "ep": 2}, "tp2-ep2-etp1": {"tp": 2, "ep": 2, "etp": 1},
    "tp2-pp2-ep2": {"tp": 2, "pp": 2, "ep": 2}, "pp2-vpp2": {"pp": 2, "vpp": 2},
    "uneven": {"pp": 3, "first": 1, "last": 2}, "tp2-etp1": {"tp": 2, "etp": 1},
    "everything": {"tp": 2, "pp": 2, "ep": 4, "etp": 1, "vpp": 2},
}
NORM = "decoder.layers.0.input_layernorm.weight"
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"


def to_ranks(source, target: Path, layout: ParallelLayout, **options) -> Path:
    convert(source, RankDirSink(target, layout, **options))
    return target


def to_hf(source, target: Path, **options) -> Path:
    convert(source, HFSink(target, **options))
    return target


def change(path: Path, edit) -> None:
    contents = torch.load(path, weights_only=False)
    edit(contents)
    torch.save(contents, path)


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return random_hf_directory(tmp_path_factory.mktemp("hf") / "hf", MixtralConfig(**TINY), torch.bfloat16)


@pytest.fixture
def ranks(hf, tmp_path) -> Path:
    return to_ranks(HFSource(hf), tmp_path / "mg", ParallelLayout(tp=2, ep=2))


# -- Round trips -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_there_and_back_is_bit_exact(tmp_path, layout, dtype):
    uneven = {"num_hidden_layers": 5} if layout == "uneven" else {}
    original = tiny_hf_mixtral(tmp_path / "hf", dtype, vocab_size=97, **uneven)
    to_ranks(HFSource(original), tmp_path / "mg", ParallelLayout(**LAYOUTS[layout]), vocab_divisible_by=8)
    assert_same_weights(original, to_hf(open_source(tmp_path / "mg"), tmp_path / "back", template=original))


def test_random_models_through_two_random_layouts(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # nothing here need survive a power failure
    draw = random.Random(11)

    def layout_for(config: MixtralConfig) -> ParallelLayout:
        while True:
            tp = draw.choice([1, 2, 4])
            layout = ParallelLayout(
                tp=tp, pp=draw.choice([1, 1, 2, 3, 4]), ep=draw.choice([1, 2, 3, 4]), etp=draw.choice([None, None, 1]),
                vpp=draw.choice([1, 1, 2]), first=draw.choice([None, None, 1]), last=draw.choice([None, None, 2]))
            try:
                return layout.validate(config)
            except ConfigError:
                continue

    for case in range(200):
        groups = draw.choice([1, 2, 4])
        config = MixtralConfig(
            vocab_size=draw.randint(5, 130), hidden_size=8 * draw.randint(1, 3) * groups,
            intermediate_size=4 * draw.randint(1, 9), num_hidden_layers=draw.randint(1, 6),
            num_attention_heads=groups * draw.randint(1, 3), num_key_value_heads=groups,
            head_dim=2 * draw.randint(1, 5), num_local_experts=draw.choice([1, 2, 3, 4, 6]), num_experts_per_tok=1,
            tie_word_embeddings=draw.random() < 0.4)
        folder = tmp_path / str(case)
        original = random_hf_directory(folder / "hf", config, draw.choice([torch.bfloat16, torch.float32]), case)
        first, second = layout_for(config), layout_for(config)
        to_ranks(HFSource(original), folder / "a", first, vocab_divisible_by=draw.choice([1, 3, 16]))
        to_ranks(RankDirSource(folder / "a"), folder / "b", second, vocab_divisible_by=draw.choice([1, 5]))
        to_hf(RankDirSource(folder / "b"), folder / "back")
        assert_same_weights(original, folder / "back")
        shutil.rmtree(folder)


# -- What a file holds -----------------------------------------------------------------------------------


def test_a_file_holds_what_the_engine_expects(hf, tmp_path):
    root = to_ranks(HFSource(hf), tmp_path / "mg", ParallelLayout(tp=2, pp=2, ep=2, vpp=2), vocab_divisible_by=50)
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert MixtralConfig.from_checkpoint(root) == MixtralConfig.from_hf_dir(hf)
    names = sorted(path.name for path in (root / "release").iterdir())
    assert names == [f"mp_rank_{tp:02d}_{pp:03d}_{ep:03d}" for tp in (0, 1) for pp in (0, 1) for ep in (0, 1)]
    contents = torch.load(root / "release" / names[0] / "model_optim_rng.pt", weights_only=False)
    assert contents["checkpoint_version"] == 3.0 and contents["iteration"] == 0
    assert {"model0", "model1"} < contents.keys() and "model" not in contents
    assert contents["model0"]["decoder.layers.0.self_attention.linear_proj._extra_state"] is None
    args = contents["args"]
    assert (args.tensor_model_parallel_size, args.expert_model_parallel_size, args.padded_vocab_size) == (2, 2, 100)
    assert args.virtual_pipeline_model_parallel_size == 2 and args.params_dtype == torch.bfloat16


def test_square_matrices_are_not_turned(tmp_path):
    """Where rows and columns are as many, no shape tells that a matrix lies the wrong way round."""
    config = MixtralConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
                           num_key_value_heads=4, head_dim=2, num_local_experts=8, num_experts_per_tok=2)
    original = random_hf_directory(tmp_path / "hf", config)
    hf = tensors_of(original)
    root = to_ranks(HFSource(original), tmp_path / "mg", ParallelLayout())
    stored = torch.load(root / "release/mp_rank_00/model_optim_rng.pt", weights_only=False)["model"]
    layer, block = "decoder.layers.0.", "model.layers.0."
    for name, theirs in (("embedding.word_embeddings", "model.embed_tokens"), ("output_layer", "lm_head"),
                         (f"{layer}mlp.router", f"{block}block_sparse_moe.gate"),
                         (f"{layer}self_attention.linear_proj", f"{block}self_attn.o_proj"),
                         (f"{layer}mlp.experts.local_experts.5.linear_fc2", f"{block}block_sparse_moe.experts.5.w2")):
        assert torch.equal(stored[f"{name}.weight"], hf[f"{theirs}.weight"]), name
    gate, up = stored[f"{layer}mlp.experts.local_experts.5.linear_fc1.weight"].chunk(2)
    assert torch.equal(gate, hf[f"{block}block_sparse_moe.experts.5.w1.weight"])
    assert torch.equal(up, hf[f"{block}block_sparse_moe.experts.5.w3.weight"])
    qkv = stored[f"{layer}self_attention.linear_qkv.weight"].reshape(4, 3, 2, 8)
    for index, name in enumerate("qkv"):
        assert torch.equal(qkv[:, index].reshape(8, 8), hf[f"{block}self_attn.{name}_proj.weight"])
    assert_same_weights(original, to_hf(open_source(root), tmp_path / "back"))


def test_a_tensor_is_stored_without_the_rest_of_its_file(ranks):
    path = ranks / "release" / "mp_rank_00_000" / "model_optim_rng.pt"
    weights = torch.load(path, weights_only=False)["model"].values()
    assert path.stat().st_size < sum(t.nbytes for t in weights if t is not None) + 64_000


def test_sliding_window_counts_as_the_engine_does(tmp_path):
    config = MixtralConfig(**TINY, sliding_window=16)
    root = to_ranks(HFSource(random_hf_directory(tmp_path / "hf", config)), tmp_path / "mg", ParallelLayout())
    args = torch.load(root / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)["args"]
    assert args.window_size == (15, 0)
    (root / "mixtral_config.json").unlink()
    assert RankDirSource(root).config.sliding_window == 16


# -- Files that the engine itself saved ------------------------------------------------------------------


def test_a_training_checkpoint_with_optimizer_and_random_states(hf, ranks, tmp_path):
    engine = ranks / "iter_0000012"
    (ranks / "release").rename(engine)
    (ranks / "latest_checkpointed_iteration.txt").write_text("12\n")
    (ranks / "mixtral_config.json").unlink()  # the engine's own programs do not write it

    def as_saved_by_a_run(contents):
        del contents["megatron_mixtral"]
        contents["args"].exit_signal = signal.SIGTERM
        states = {"random_rng_state": random.getstate(), "np_rng_state": numpy.random.get_state(),
                  "torch_rng_state": torch.get_rng_state()}
        contents.update(iteration=12, optimizer={"state": {0: torch.zeros(9)}}, rng_state=[states])

    for path in engine.glob("*/model_optim_rng.pt"):
        change(path, as_saved_by_a_run)
    source = open_source(ranks)
    assert source.config == replace(MixtralConfig.from_hf_dir(hf), rope_theta=1e6)
    assert_same_weights(hf, to_hf(source, tmp_path / "back"))
    assert source.left_behind == ["optimizer", "rng_state"]
    assert_same_weights(hf, to_hf(open_source(engine), tmp_path / "back2"))  # the iteration itself


def test_transformer_engine_names_are_read(hf, ranks, tmp_path):
    def rename(contents):
        model = contents["model"]
        for name in list(model):
            new = name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
            if ".local_experts." in new and new.endswith(".weight"):
                head, tail = new.split("local_experts.")
                new = f"{head}{tail.split('.')[1]}.weight{tail.split('.')[0]}"
            model[new] = model.pop(name)

    for path in ranks.glob("release/*/model_optim_rng.pt"):
        change(path, rename)
    assert_same_weights(hf, to_hf(open_source(ranks), tmp_path / "back"))


# -- Refusals --------------------------------------------------------------------------------------------


def shard(ranks: Path, tp: int, ep: int) -> Path:
    return ranks / "release" / f"mp_rank_{tp:02d}_{ep:03d}" / "model_optim_rng.pt"


def test_damaged_shards_are_refused_by_tensor_and_file(ranks, tmp_path):
    whole = shutil.copytree(ranks, tmp_path / "whole")
    edits = {
        "missing": (lambda c: c["model"].pop(QKV), QKV),
        "left over": (lambda c: c["model"].update(surplus=torch.ones(1)), "surplus"),
        "misshapen": (lambda c: c["model"].update({QKV: torch.ones(3, 3)}), QKV),
        "not a tensor": (lambda c: c["model"].update({QKV: None}), QKV),
        "integers": (lambda c: c["model"].update({NORM: torch.ones(32, dtype=torch.int32)}), NORM),
        "contradicting": (lambda c: c["model"].update({NORM: c["model"][NORM] + 1}), "different values"),
        "another type": (lambda c: c["model"].update({QKV: c["model"][QKV].float()}), "q_proj"),
        "no model": (lambda c: c.pop("model"), "model"),
        "other layout": (lambda c: setattr(c["args"], "tensor_model_parallel_size", 4), "layout"),
    }
    for kind, (edit, named) in edits.items():
        shutil.rmtree(ranks)
        shutil.copytree(whole, ranks)
        change(shard(ranks, 1, 1), edit)
        with pytest.raises(CheckpointError, match=named) as error:
            to_hf(open_source(ranks), tmp_path / "out")
        assert "mp_rank_01_001" in str(error.value), f"{kind}: {error.value}"
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_missing_surplus_truncated_and_swapped_files_are_refused(ranks, tmp_path):
    whole = shutil.copytree(ranks, tmp_path / "whole")

    def swap():
        shard(ranks, 0, 0).rename(tmp_path / "kept")
        shard(ranks, 1, 0).rename(shard(ranks, 0, 0))
        (tmp_path / "kept").rename(shard(ranks, 1, 0))

    damages = {
        "is missing": lambda: shard(ranks, 1, 1).unlink(),
        "not a whole torch file": lambda: os.truncate(shard(ranks, 1, 1), 5000),
        "does not belong": lambda: shutil.copytree(shard(ranks, 1, 1).parent, ranks / "release" / "mp_rank_02_000"),
        "were files swapped": swap,
        "no shard of rank 0": lambda: shutil.rmtree(shard(ranks, 0, 0).parent),
        "does not exist": lambda: (ranks / "latest_checkpointed_iteration.txt").write_text("4"),
        "expected 'release'": lambda: (ranks / "latest_checkpointed_iteration.txt").write_text("../../x"),
    }
    for sentence, damage in damages.items():
        shutil.rmtree(ranks)
        shutil.copytree(whole, ranks)
        damage()
        with pytest.raises(CheckpointError, match=sentence):
            to_hf(open_source(ranks), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mg", "whole"]


class Payload:
    """Unpickling this would run a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["args", "model", "rng_state"])
def test_a_pickled_payload_does_not_run(ranks, tmp_path, place):
    trap = tmp_path / "trap"
    contents = torch.load(shard(ranks, 0, 0), weights_only=False)
    contents[place] = Payload(trap) if place != "model" else contents["model"] | {QKV: Payload(trap)}
    torch.save(contents, shard(ranks, 0, 0))
    with pytest.raises(CheckpointError, match=r"posix\.system.*nothing in it was run") as error:
        open_source(ranks).check()
    assert "mp_rank_00_000" in str(error.value)
    assert not trap.exists()


@pytest.mark.parametrize("name", [NORM, "decoder.layers.1.mlp.router.weight", QKV])
def test_copies_are_compared_whole(ranks, name, monkeypatch):
    """Large ones in parts; what differs may lie in any of them."""
    monkeypatch.setattr(rank_source, "COMPARED", 8)
    whole = torch.load(shard(ranks, 1, 1), weights_only=False)["model"][name]
    for place in range(0, whole.numel(), max(1, whole.numel() // 9)):
        other = whole.clone()
        other.view(-1)[place] += 1
        change(shard(ranks, 1, 1), lambda contents, other=other: contents["model"].update({name: other}))
        source = RankDirSource(ranks)
        with pytest.raises(CheckpointError, match="different values"):
            for tensor in hf_tensors(source.config).values():
                source.fragments(tensor)


def test_copies_may_be_left_uncompared(hf, ranks, tmp_path):
    change(shard(ranks, 1, 1), lambda c: c["model"].update({NORM: c["model"][NORM] + 1}))
    assert_same_weights(hf, to_hf(RankDirSource(ranks, compare_copies=False), tmp_path / "out"))


def test_layouts_that_have_no_file_names_or_no_model(hf, tmp_path):
    source = HFSource(hf)
    with pytest.raises(ConfigError, match="expert tensor parallelism"):
        convert(source, RankDirSink(tmp_path / "mg", ParallelLayout(tp=1, etp=2)))
    with pytest.raises(ConfigError, match="--target-tensor-parallel-size"):
        convert(source, RankDirSink(tmp_path / "mg", ParallelLayout(tp=3)))
    assert list(tmp_path.iterdir()) == []


def test_arguments_of_another_network_are_refused(ranks):
    (ranks / "mixtral_config.json").unlink()
    for name, value in (("swiglu", False), ("normalization", "LayerNorm"), ("add_bias_linear", True),
                        ("account_for_loss_in_pipeline_split", True), ("rotary_base", None)):
        change(shard(ranks, 0, 0), lambda c, name=name, value=value: setattr(c["args"], name, value))
        with pytest.raises(CheckpointError, match=name if name != "rotary_base" else "rope_theta"):
            open_source(ranks)
        good = {"swiglu": True, "normalization": "RMSNorm", "add_bias_linear": False}.get(name)
        change(shard(ranks, 0, 0), lambda c, name=name, good=good: setattr(c["args"], name, good))
    change(shard(ranks, 0, 0), lambda c: c.pop("args"))
    with pytest.raises(CheckpointError, match="no args"):
        open_source(ranks)


def test_parts_of_unlike_types_need_a_cast(hf, tmp_path):
    shutil.copytree(hf, tmp_path / "mixed")
    from safetensors.torch import save_file

    tensors = tensors_of(hf)
    name = "model.layers.0.self_attn.k_proj.weight"
    save_file(tensors | {name: tensors[name].float()}, tmp_path / "mixed" / "model.safetensors", {"format": "pt"})
    source = HFSource(tmp_path / "mixed")
    with pytest.raises(CheckpointError, match="--params-dtype"):
        to_ranks(source, tmp_path / "mg", ParallelLayout())
    convert(source, RankDirSink(tmp_path / "mg", ParallelLayout()), dtype=torch.float32)
    stored = torch.load(tmp_path / "mg/release/mp_rank_00/model_optim_rng.pt", weights_only=False)
    assert isinstance(stored["args"], argparse.Namespace)
    assert {t.dtype for t in stored["model"].values() if t is not None} == {torch.float32}
