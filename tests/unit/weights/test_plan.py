"""Plans: complete for every layout, refused where they are not, free of torch, printable."""

import random
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers.models import TINY

from megatron_mixtral.config import Coord, MixtralConfig, ParallelLayout, preset
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.weights.plan import ShardPlan, all_plans, check_complete, describe, padded_vocabulary

CONFIG = MixtralConfig(**TINY)


def test_random_layouts_tile_every_tensor_exactly():
    draw = random.Random(7)
    seen = 0
    while seen < 150:
        config = replace(CONFIG, num_hidden_layers=draw.randint(1, 12), num_local_experts=draw.choice([1, 2, 4, 6, 8]),
                         num_experts_per_tok=1, num_key_value_heads=draw.choice([1, 2, 4]),
                         vocab_size=draw.randint(3, 200), tie_word_embeddings=draw.random() < 0.3)
        layout = ParallelLayout(tp=draw.choice([1, 2, 4]), pp=draw.choice([1, 2, 3, 4]), ep=draw.choice([1, 2, 4]),
                                etp=draw.choice([None, 1, 2]), vpp=draw.choice([1, 1, 2, 3]),
                                first=draw.choice([None, None, 1, 2]), last=draw.choice([None, None, 1]))
        try:
            layout.validate(config)
        except ConfigError:
            continue
        padded = padded_vocabulary(config, layout, draw.choice([1, 1, 7, 128]))
        check_complete(all_plans(config, layout, padded), config)
        seen += 1


@pytest.mark.parametrize("axis", ["tp", "pp", "ep"])
def test_a_lacking_shard_is_noticed(axis):
    layout = ParallelLayout(tp=2, pp=2, ep=2)
    kept = [plan for plan in all_plans(CONFIG, layout) if getattr(plan.coord, axis) == 0]
    with pytest.raises(CheckpointError, match="units"):
        check_complete(kept, CONFIG)


def test_layers_and_experts_count_from_zero_in_every_shard():
    plan = ShardPlan(CONFIG, ParallelLayout(pp=2, vpp=2, ep=2), Coord(pp=1, ep=1), chunk=1)
    names = {t.name: t for t in plan.tensors()}
    fc1 = names["decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight"]
    assert fc1.pieces[0].name == "model.layers.3.block_sparse_moe.experts.2.w1.weight"
    assert "decoder.final_layernorm.weight" in names and "output_layer.weight" in names
    assert not any(name.startswith("embedding") for name in names)


def test_tied_output_layer_is_a_copy_on_a_last_stage_of_its_own_only():
    tied = replace(CONFIG, tie_word_embeddings=True)
    single = ShardPlan(tied, ParallelLayout(), Coord())
    assert "output_layer.weight" not in {t.name for t in single.tensors()}
    assert "output_layer._extra_state" in single.extra_states()
    last = ShardPlan(tied, ParallelLayout(pp=2), Coord(pp=1)).tensors()[-1]
    assert last.name == "output_layer.weight"
    assert last.pieces[0].name == "model.embed_tokens.weight"


def test_description_of_8x7b_weighs_what_it_should():
    config = preset("mixtral-8x7b")
    text = describe(all_plans(config, ParallelLayout(tp=1, pp=8, ep=2)))
    assert len(text.splitlines()) == 17
    assert "layers 28-31, experts 4-7 + output_layer" in text
    # Both expert ranks of a stage hold its dense weights.
    dense = config.total_parameters - 32 * 8 * config.expert_parameters
    assert f"{2 * (config.total_parameters + dense) / 1e9:.3g} GB in all" in text


def test_planning_needs_no_torch():
    code = ("import sys; import megatron_mixtral.weights.plan, megatron_mixtral.weights.cli; "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
