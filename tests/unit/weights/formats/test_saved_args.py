"""The arguments that a checkpoint carries: what they say about the model, and whether a run can load it."""

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import TINY, random_hf_directory

from megatron_mixtral.config import CONFIG_FILE, MixtralConfig, ParallelLayout, engine
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights import open_source
from megatron_mixtral.weights.conversion import convert
from megatron_mixtral.weights.engine_args import release_state
from megatron_mixtral.weights.formats import dist_sink, rank_sink
from megatron_mixtral.weights.formats.dist_sink import DistSink
from megatron_mixtral.weights.formats.hf_sink import HFSink
from megatron_mixtral.weights.formats.hf_source import HFSource
from megatron_mixtral.weights.formats.rank_sink import RankDirSink
from megatron_mixtral.weights.formats.saved_args import saved_arguments

PP2 = ParallelLayout(pp=2, ep=2)


def run(layout: ParallelLayout) -> Namespace:
    return release_state(MixtralConfig(**TINY), layout, 96, 1, {"all": "bfloat16"})["args"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> HFSource:
    folder = tmp_path_factory.mktemp("hf") / "hf"
    return HFSource(random_hf_directory(folder, MixtralConfig(**TINY), torch.bfloat16))


def test_both_forms_carry_them(source: HFSource, tmp_path: Path) -> None:
    convert(source, RankDirSink(tmp_path / "ranks", PP2))
    convert(source, DistSink(tmp_path / "dist"))
    for form in ("ranks", "dist"):
        found = saved_arguments(tmp_path / form / "release", run(PP2))
        assert found is not None and found.num_layers == source.config.num_hidden_layers


@pytest.mark.parametrize(("said", "words"), [
    ({"use_rope_scaling": True}, "not a Mixtral: use_rope_scaling is True, expected False"),
    ({"rotary_base": 10000}, "its args say rotary_base 10000, the run says rope_theta 1000000"),
])
@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_a_run_does_not_go_on_from_another_model(form, said, words, source, tmp_path, monkeypatch) -> None:
    folder = checkpoint_of(form, source, tmp_path / "mg", monkeypatch, **said)
    with pytest.raises(CheckpointError, match=words):
        saved_arguments(folder / "release", run(ParallelLayout()))


@pytest.mark.parametrize(("layout", "words"), [
    (ParallelLayout(pp=2, ep=2, vpp=2), "layout tp1-pp2-ep2, the run is tp1-pp2-ep2-vpp2"),
    (ParallelLayout(pp=2, ep=1), "layout tp1-pp2-ep2, the run is tp1-pp2-ep1"),
    (ParallelLayout(pp=2, ep=2, first=1), "the run is tp1-pp2-ep2-first1"),
])
def test_rank_directories_of_another_layout_are_refused(source: HFSource, tmp_path: Path, layout: ParallelLayout,
                                                        words: str) -> None:
    convert(source, RankDirSink(tmp_path / "ranks", PP2))
    with pytest.raises(CheckpointError, match=words):
        saved_arguments(tmp_path / "ranks/release", run(layout))


def test_a_missing_rank_directory_is_named(source: HFSource, tmp_path: Path) -> None:
    convert(source, RankDirSink(tmp_path / "ranks", PP2))
    (tmp_path / "ranks/release/mp_rank_00_001_001/model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointError, match=r"mp_rank_00_001_001/model_optim_rng.pt is missing"):
        saved_arguments(tmp_path / "ranks/release", run(PP2))


# -- what they say about the model -------------------------------------------------------------------------

# Every switch of another architecture that the engine stores, with a value that is not a Mixtral's. Nothing here is
# taken from the library: a switch that is lost from its table is exported without a word again.
FOREIGN: dict[str, Any] = {
    "moe_router_topk_scaling_factor": 2.5, "moe_router_num_groups": 2, "moe_router_group_topk": 1,
    "moe_router_enable_expert_bias": True, "moe_apply_probs_on_input": True, "moe_latent_size": 16,
    "moe_shared_expert_intermediate_size": 16, "mtp_num_layers": 1, "multi_latent_attention": True,
    "experimental_attention_variant": "dsa", "attention_output_gate": True, "softmax_type": "learnable",
    "qk_layernorm": True, "qk_l2_norm": True, "no_rope_freq": 2, "rotary_interleaved": True, "use_rope_scaling": True,
    "rotary_seq_len_interpolation_factor": 2, "squared_relu": True, "quick_geglu": True, "openai_gelu": True,
    "activation_func_clamp_value": 7.0, "glu_linear_offset": 1.0, "moe_mlp_glu_interleave_size": 32,
    "apply_residual_connection_post_layernorm": True, "layernorm_zero_centered_gamma": True,
    "apply_layernorm_1p": True, "window_attn_skip_freq": 2, "linear_attention_freq": 2, "is_hybrid_model": True,
    "hybrid_layer_pattern": "M*M*", "heterogeneous_layers_config_path": "layers.json", "use_mup": True,
    # what a Mixtral has, said otherwise
    "swiglu": False, "normalization": "LayerNorm", "position_embedding_type": "yarn", "rotary_percent": 0.5,
    "add_bias_linear": True, "add_qkv_bias": True, "moe_router_pre_softmax": True,
    "moe_router_score_function": "sigmoid", "moe_layer_freq": [0, 1, 1, 1],
}
HARMLESS: dict[str, Any] = {
    "moe_router_topk_scaling_factor": 1.0, "use_rope_scaling": False, "moe_shared_expert_intermediate_size": None,
    "softmax_type": "vanilla", "moe_layer_freq": [1, 1, 1, 1], "attention_dropout": 0.1, "hidden_dropout": 0.1,
    "rotary_seq_len_interpolation_factor": 1, "window_size": (-1, 0), "mtp_num_layers": 0,
}
FORMS = {"torch": (rank_sink, RankDirSink), "torch_dist": (dist_sink, DistSink)}


def checkpoint_of(form: str, source: HFSource, folder: Path, monkeypatch: pytest.MonkeyPatch, identity: bool = False,
                  **said: Any) -> Path:
    """A tiny checkpoint whose saved arguments say something else besides; of the stock engine without `identity`."""

    def changed(*args: Any, **kwargs: Any) -> dict[str, Any]:
        state = release_state(*args, **kwargs)
        found = vars(state["args"]) | said
        return state | {"args": Namespace(**{name: value for name, value in found.items() if value is not ...})}

    module, sink = FORMS[form]
    monkeypatch.setattr(module, "release_state", changed)
    convert(source, sink(folder, ParallelLayout()))
    if not identity:
        (folder / CONFIG_FILE).unlink()
    return folder


def export(checkpoint: Path, target: Path) -> MixtralConfig:
    source = open_source(checkpoint)
    convert(source, HFSink(target))
    return MixtralConfig.from_hf_dir(target)


def test_every_switch_of_the_table_is_tried() -> None:
    fixed = {row.argument for row in engine.TABLE if row.field is None and row.read}
    assert {*engine.FOREIGN, *fixed, "moe_router_pre_softmax"} == set(FOREIGN)  # that one depends on the experts


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize(("form", "identity"), [("torch", False), ("torch_dist", False), ("torch_dist", True)])
def test_another_architecture_is_not_exported_as_a_mixtral(form, name, identity, source, tmp_path, monkeypatch) -> None:
    folder = checkpoint_of(form, source, tmp_path / "mg", monkeypatch, identity, **{name: FOREIGN[name]})
    with pytest.raises(CheckpointError) as found:
        export(folder, tmp_path / "hf")
    said = str(found.value)
    assert f"{name} is {FOREIGN[name]!r}" in said and "expected" in said and str(folder) in said
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("form", FORMS)
def test_harmless_values_are_exported(form, source, tmp_path, monkeypatch) -> None:
    for number, (name, value) in enumerate(HARMLESS.items()):
        folder = checkpoint_of(form, source, tmp_path / f"mg{number}", monkeypatch, **{name: value})
        found = export(folder, tmp_path / f"hf{number}")
        assert found == dataclasses.replace(source.config, **BOOKKEEPING), name


# Nothing of these is in the engine's arguments.
BOOKKEEPING = {"router_aux_loss_coef": 0.02, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02}


@pytest.mark.parametrize("form", FORMS)
def test_what_old_engines_did_not_store_is_no_contradiction(form, source, tmp_path, monkeypatch) -> None:
    old = dict.fromkeys(("moe_router_pre_softmax", "moe_router_score_function", "add_qkv_bias", "rotary_interleaved",
                         "squared_relu", "moe_layer_freq", "moe_router_enable_expert_bias", "window_size"), ...)
    folder = checkpoint_of(form, source, tmp_path / "mg", monkeypatch, **old)
    assert export(folder, tmp_path / "hf") == dataclasses.replace(source.config, **BOOKKEEPING)


@pytest.mark.parametrize(("name", "value", "words"), [
    ("hidden_size", 64, "hidden_size 64, .*mixtral_config.json says hidden_size 32"),
    ("rotary_base", 10000, "rotary_base 10000, .*mixtral_config.json says rope_theta 1000000.0"),
    ("moe_router_topk", 1, "moe_router_topk 1, .*says num_experts_per_tok 2"),
    ("window_size", (15, 0), r"window_size \(15, 0\), .*says sliding_window None"),
    ("untie_embeddings_and_output_weights", False, "untie_embeddings_and_output_weights False, .*tie_word_embeddings"),
])
@pytest.mark.parametrize("form", FORMS)
def test_arguments_that_contradict_the_identity_are_refused(form, name, value, words, source, tmp_path,
                                                            monkeypatch) -> None:
    folder = checkpoint_of(form, source, tmp_path / "mg", monkeypatch, identity=True, **{name: value})
    with pytest.raises(CheckpointError, match=words):
        export(folder, tmp_path / "hf")
