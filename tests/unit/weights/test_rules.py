"""The rule table against transformers' names, and its views against slicing written out head by head."""

import pytest
import torch
from helpers.models import TINY, random_hf_directory, tensors_of, tiny_hf_mixtral

from megatron_mixtral.config import Coord, MixtralConfig, ParallelLayout, preset
from megatron_mixtral.weights.formats.hf_source import HFSource
from megatron_mixtral.weights.plan import ShardPlan
from megatron_mixtral.weights.rules import RULES, hf_tensors
from megatron_mixtral.weights.streaming import assemble


def test_ten_rules_whose_slices_and_joins_commute():
    assert len(RULES) == 10 == len({rule.name for rule in RULES})
    for rule in RULES:
        assert len(rule.pieces) == 1 or rule.shard_dim != rule.join_dim, rule.name
        sizes = {piece.view(MixtralConfig())[rule.shard_dim] for piece in rule.pieces}
        assert len(sizes) == 1, f"{rule.name}: pieces must have the same number of units to shard"


@pytest.mark.parametrize("overrides", [{}, {"head_dim": 16}, {"tie_word_embeddings": True}])
def test_names_and_shapes_are_those_that_transformers_saves(tmp_path, overrides):
    saved = tensors_of(tiny_hf_mixtral(tmp_path / "hf", **overrides))
    ours = hf_tensors(MixtralConfig.from_hf_dir(tmp_path / "hf"))
    assert {name: tuple(t.shape) for name, t in saved.items()} == {name: t.shape for name, t in ours.items()}


@pytest.mark.parametrize("name", ["tiny", "mixtral-4x7b", "mixtral-8x7b", "mixtral-8x22b"])
def test_every_parameter_of_the_presets_is_in_the_table(name):
    config = preset(name)
    elements = sum(torch.Size(tensor.shape).numel() for tensor in hf_tensors(config).values())
    assert elements == config.total_parameters


@pytest.mark.parametrize("tp", [1, 2])
def test_qkv_equals_a_loop_over_query_groups(tmp_path, tp):
    config = MixtralConfig(**(TINY | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6}))
    source = HFSource(random_hf_directory(tmp_path / "hf", config))
    hf = tensors_of(tmp_path / "hf")
    q, k, v = (hf[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    for rank in range(tp):
        rows = []
        for group in range(rank * 4 // tp, (rank + 1) * 4 // tp):
            for head in range(group * 2, group * 2 + 2):  # two query heads share a group
                rows += [q[head * 6 + i] for i in range(6)]
            rows += [k[group * 6 + i] for i in range(6)]
            rows += [v[group * 6 + i] for i in range(6)]
        plan = ShardPlan(config, ParallelLayout(tp=tp), Coord(tp=rank, etp=rank))
        wanted = next(t for t in plan.tensors() if t.name == "decoder.layers.1.self_attention.linear_qkv.weight")
        assert torch.equal(assemble(wanted, source), torch.stack(rows))


def test_fc1_keeps_gate_above_up_within_every_shard(tmp_path):
    config = MixtralConfig(**TINY)
    source = HFSource(random_hf_directory(tmp_path / "hf", config))
    hf, width = tensors_of(tmp_path / "hf"), TINY["intermediate_size"] // 2
    gate, up = (hf[f"model.layers.0.block_sparse_moe.experts.3.{w}.weight"] for w in ("w1", "w3"))
    for rank in range(2):
        plan = ShardPlan(config, ParallelLayout(tp=2, ep=2), Coord(tp=rank, etp=rank, ep=1))
        name = "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight"
        wanted = next(t for t in plan.tensors() if t.name == name)
        rows = [m[rank * width + i] for m in (gate, up) for i in range(width)]
        assert torch.equal(assemble(wanted, source), torch.stack(rows))


def test_row_parallel_weights_are_cut_by_columns(tmp_path):
    config = MixtralConfig(**TINY)
    source = HFSource(random_hf_directory(tmp_path / "hf", config))
    hf = tensors_of(tmp_path / "hf")
    plan = {t.name: t for t in ShardPlan(config, ParallelLayout(tp=2), Coord(tp=1, etp=1)).tensors()}
    proj = assemble(plan["decoder.layers.2.self_attention.linear_proj.weight"], source)
    fc2 = assemble(plan["decoder.layers.2.mlp.experts.local_experts.0.linear_fc2.weight"], source)
    assert torch.equal(proj, hf["model.layers.2.self_attn.o_proj.weight"][:, 16:])
    assert torch.equal(fc2, hf["model.layers.2.block_sparse_moe.experts.0.w2.weight"][:, 24:])


def test_padded_vocabulary_is_zero(tmp_path):
    config = MixtralConfig(**(TINY | {"vocab_size": 97}))
    source = HFSource(random_hf_directory(tmp_path / "hf", config))
    embedding = tensors_of(tmp_path / "hf")["model.embed_tokens.weight"]
    shards = [ShardPlan(config, ParallelLayout(tp=2), Coord(tp=rank, etp=rank), padded_vocab=256).tensors()[0]
              for rank in range(2)]
    whole = torch.cat([assemble(shard, source) for shard in shards])
    assert whole.shape == (256, 32)
    assert torch.equal(whole[:97], embedding)
    assert not whole[97:].any()
