"""The table of what a Mixtral is to the engine: both ways, the window rule, and what is written where."""

import argparse
import dataclasses

import pytest

from megatron_mixtral.config import MixtralConfig, ParallelLayout, engine, preset
from megatron_mixtral.errors import CheckpointError, ConfigError

CONFIGS = {
    "tiny": preset("tiny"), "8x22b": preset("8x22b"),
    "tied, windowed": MixtralConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                    num_key_value_heads=2, head_dim=32, vocab_size=101, tie_word_embeddings=True,
                                    sliding_window=7, rope_theta=123456.5, rms_norm_eps=1e-6),
}
# What the architecture does not say: the engine's arguments have it elsewhere, or not at all.
DEFAULTS = {"router_aux_loss_coef": 0.02, "router_jitter_noise": 0.0, "initializer_range": 0.02, "bos_token_id": 1,
            "eos_token_id": 2, "dense_config": None}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_there_and_back(config: MixtralConfig) -> None:
    saved = argparse.Namespace(**engine.saved_args(config))
    assert engine.config_from_args(saved, "here") == dataclasses.replace(config, **DEFAULTS)
    run = argparse.Namespace(**engine.architecture_args(config))
    assert engine.config_from_args(run, "here") == dataclasses.replace(config, **DEFAULTS)
    engine.check_saved(saved, config, "here", "there")
    engine.check_flags(run, config)


def test_every_field_of_the_architecture_is_in_the_table() -> None:
    named = {row.field for row in engine.TABLE}
    assert {field.name for field in dataclasses.fields(MixtralConfig)} - named == set(DEFAULTS)


@pytest.mark.parametrize(("huggingface", "megatron"), [(None, None), (1, (0, 0)), (4096, (4095, 0))])
def test_the_window_counts_the_query_in_one_of_the_two(huggingface, megatron) -> None:
    assert engine.window_size(huggingface) == megatron
    assert engine.sliding_window(megatron) == huggingface
    assert engine.sliding_window((-1, 0)) is None


def test_transformer_fields_are_fields_of_the_engine() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = engine.transformer_fields(preset("tiny"))
    assert set(fields) <= {field.name for field in dataclasses.fields(TransformerConfig)}
    assert (fields["num_moe_experts"], fields["gated_linear_unit"]) == (8, True)
    assert fields["layernorm_zero_centered_gamma"] is False


def test_a_contradicting_value_is_refused_whatever_row_it_is_of() -> None:
    """Every flag of the table, set to something else."""
    config = preset("tiny")
    for name, value in engine.architecture_args(config).items():
        said = engine.architecture_args(config) | {name: "something else" if name != "window_size" else [1, 0]}
        with pytest.raises(ConfigError, match="contradicts the model's"):
            engine.check_flags(argparse.Namespace(**said), config)
        assert value == engine.saved_args(config)[name]


@pytest.mark.parametrize(("said", "words"), [
    ({"num_layers": None}, "does not say num_hidden_layers"),
    ({"num_query_groups": 3}, "not a multiple of num_key_value_heads 3"),
])
def test_arguments_that_do_not_say_a_model(said, words) -> None:
    with pytest.raises(CheckpointError, match=words):
        engine.config_from_args(argparse.Namespace(**engine.saved_args(preset("tiny")) | said), "here")


def test_heads_without_groups() -> None:
    saved = engine.saved_args(preset("tiny")) | {"group_query_attention": False, "num_query_groups": 1}
    assert engine.config_from_args(argparse.Namespace(**saved), "here").num_key_value_heads == 8


@pytest.mark.parametrize("layout", [
    ParallelLayout(), ParallelLayout(tp=2, pp=2, ep=2), ParallelLayout(pp=2, vpp=2), ParallelLayout(tp=2, etp=1),
    ParallelLayout(pp=2, first=1, last=3)])
def test_layouts_there_and_back(layout: ParallelLayout) -> None:
    assert engine.layout_from_args(argparse.Namespace(**engine.layout_args(layout)), "here") == layout


def test_layouts_of_others_and_older_names() -> None:
    said = engine.layout_args(ParallelLayout(pp=2))
    older = argparse.Namespace(**said | {"num_virtual_stages_per_pipeline_rank": 2})
    assert engine.layout_from_args(older, "here").vpp == 2
    with pytest.raises(CheckpointError, match="pipeline_model_parallel_layout = 'Et|tL', which is not supported"):
        engine.layout_from_args(argparse.Namespace(**said, pipeline_model_parallel_layout="Et|tL"), "here")
    with pytest.raises(CheckpointError, match="args has no tensor_model_parallel_size"):
        engine.layout_from_args(argparse.Namespace(), "here")
