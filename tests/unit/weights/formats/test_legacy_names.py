"""Rank files under older namings: built from files that equal the engine's by the old formulas, read back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers.models import TINY, assert_same_weights, random_hf_directory

from megatron_mixtral.config import MixtralConfig, ParallelLayout
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.conversion import convert
from megatron_mixtral.weights.formats.hf_sink import HFSink
from megatron_mixtral.weights.formats.hf_source import HFSource
from megatron_mixtral.weights.formats.rank_sink import RankDirSink
from megatron_mixtral.weights.formats.rank_source import RankDirSource
from megatron_mixtral.weights.opening import open_source
from megatron_mixtral.weights.rules import hf_tensors

LAYOUTS = {"tp1": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "ep2": {"ep": 2}, "tp2-pp2": {"tp": 2, "pp": 2},
           "tp2-pp2-ep2": {"tp": 2, "pp": 2, "ep": 2}, "pp2-vpp2": {"pp": 2, "vpp": 2}, "tp2-ep2-etp1": {
               "tp": 2, "ep": 2, "etp": 1}}


def layers_of(model: dict[str, Any]) -> int:
    return 1 + max(int(name.split(".")[2]) for name in model if name.startswith("decoder.layers."))


def experts_of(model: dict[str, Any], layer: int, linear: str) -> list[torch.Tensor]:
    """A linear of all local experts of a layer, taken out of the state dict."""
    prefix = f"decoder.layers.{layer}.mlp.experts.local_experts."
    count = len([name for name in model if name.startswith(prefix) and name.endswith(f"{linear}.weight")])
    for index in range(count):
        model.pop(f"{prefix}{index}.{linear}._extra_state", None)
    return [model.pop(f"{prefix}{index}.{linear}.weight") for index in range(count)]


def grouped(model: dict[str, Any]) -> dict[str, Any]:
    """GroupedMLP: `weight1.view(experts, hidden, -1)[e]` multiplied the hidden states from the right."""
    for layer in range(layers_of(model)):
        fc1, fc2 = experts_of(model, layer, "linear_fc1"), experts_of(model, layer, "linear_fc2")
        hidden = fc1[0].shape[1]
        experts = f"decoder.layers.{layer}.mlp.experts."
        model[experts + "weight1"] = torch.stack([weight.T for weight in fc1]).reshape(hidden, -1)
        model[experts + "weight2"] = torch.stack([weight.T for weight in fc2]).reshape(-1, hidden)
    return model


def legacy(model: dict[str, Any]) -> dict[str, Any]:
    """The names of the model that megatron.legacy had, nested as its `state_dict_for_save_checkpoint` did."""
    nested: dict[str, Any] = {"encoder": {}}
    for name, value in model.items():
        if name.startswith("embedding."):
            nested["embedding"] = {"word_embeddings": {"weight": value}}
        elif name.startswith("output_layer."):
            nested.setdefault("output_layer", {})[name.removeprefix("output_layer.")] = value
        else:
            for new, old in (("input_layernorm", "input_norm"), ("pre_mlp_layernorm", "post_attention_norm"),
                             ("linear_qkv", "query_key_value"), ("linear_proj", "dense"),
                             ("final_layernorm", "final_norm")):
                name = name.replace(f".{new}.", f".{old}.")
            nested["encoder"][name.removeprefix("decoder.")] = value
    return {"language_model": nested}


def one_by_one(model: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's MoE in that model: w1, w2 and w3 of each expert, and a gate that has a linear."""
    for layer in range(layers_of(model)):
        fc1, fc2 = experts_of(model, layer, "linear_fc1"), experts_of(model, layer, "linear_fc2")
        moe = f"decoder.layers.{layer}.mlp.block.moe_layer."
        for index, (up, down) in enumerate(zip(fc1, fc2, strict=True)):
            gate, up = up.chunk(2)
            for name, weight in (("w1", gate), ("w2", down), ("w3", up)):
                model[f"{moe}experts.experts.{index}.{name}.weight"] = weight.clone()
        model[moe + "gate.weight.weight"] = model.pop(f"decoder.layers.{layer}.mlp.router.weight")
    return legacy(model)


NAMINGS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "grouped": grouped, "legacy grouped": lambda model: legacy(grouped(model)), "legacy one by one": one_by_one}


def rename(root: Path, naming: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    for path in root.glob("release/*/model_optim_rng.pt"):
        contents = torch.load(path, weights_only=False)
        for key in [key for key in contents if key.startswith("model") and isinstance(contents[key], dict)]:
            contents[key] = naming(contents[key])
        torch.save(contents, path)


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    config = MixtralConfig(**TINY | {"vocab_size": 97})
    return random_hf_directory(tmp_path_factory.mktemp("hf") / "hf", config, torch.bfloat16)


def ranks(hf: Path, target: Path, naming: str, layout: dict[str, int]) -> Path:
    source = HFSource(hf)
    convert(source, RankDirSink(target, ParallelLayout(**layout), vocab_divisible_by=4))
    rename(target, NAMINGS[naming])
    return target


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("naming", NAMINGS)
def test_an_older_naming_becomes_the_original(hf, tmp_path, naming, layout):
    source = open_source(ranks(hf, tmp_path / "mg", naming, LAYOUTS[layout]))
    convert(source, HFSink(tmp_path / "back"), verify=True)
    assert_same_weights(hf, tmp_path / "back")


def test_experts_stay_where_they_are_mapped(hf, tmp_path):
    source = RankDirSource(ranks(hf, tmp_path / "mg", "grouped", {}))
    for tensor in hf_tensors(source.config).values():
        for fragment in source.fragments(tensor):
            assert any(numpy.shares_memory(fragment.data, numpy.frombuffer(file.bytes, numpy.uint8))
                       for file in source.mapped.values()), tensor.name


@pytest.mark.parametrize(("naming", "edit", "sentence"), [
    ("grouped", lambda m: m.update({"decoder.layers.0.mlp.experts.weight1": torch.ones(32, 5)}), "into 4 experts"),
    ("grouped", lambda m: m.update({"decoder.layers.0.mlp.experts.weight1": torch.ones(4)}), "weight1 is not a matrix"),
    ("grouped", lambda m: m.update({"decoder.layers.0.mlp.experts.weight2": torch.ones(32, 32)}), "has shape"),
    ("grouped", lambda m: m.pop("decoder.layers.0.mlp.experts.weight2"), "linear_fc2.weight is missing"),
    ("grouped", lambda m: m.update({"decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight": m[
        "decoder.layers.0.mlp.experts.weight1"]}), "is stored twice"),
    ("legacy grouped", lambda m: m.update({"decoder.layers.0.input_layernorm.weight": torch.ones(32)}),
     "names of two kinds"),
    ("legacy one by one", lambda m: m["language_model"]["encoder"].pop(
        "layers.1.mlp.block.moe_layer.experts.experts.2.w3.weight"), "has w1, w2, expected w1, w2 and w3"),
    ("legacy one by one", lambda m: m["language_model"]["encoder"].update(surplus=torch.ones(1)), "decoder.surplus"),
    ("legacy one by one", lambda m: m["language_model"]["encoder"].update(
        {"layers.1.mlp.block.moe_layer.experts.experts.2.w3.weight": torch.ones(9, 9)}), "has shape"),
])
def test_what_is_not_clear_is_refused(hf, tmp_path, naming, edit, sentence):
    root = ranks(hf, tmp_path / "mg", naming, {})
    path = root / "release" / "mp_rank_00" / "model_optim_rng.pt"
    contents = torch.load(path, weights_only=False)
    edit(contents["model"])
    torch.save(contents, path)
    with pytest.raises(CheckpointError, match=sentence) as error:
        open_source(root).check()
    assert str(path) in str(error.value)


@pytest.mark.parametrize("version", [0, 2.0, None])
def test_another_order_of_query_key_and_value_is_refused(hf, tmp_path, version):
    root = ranks(hf, tmp_path / "mg", "legacy grouped", {})
    path = root / "release" / "mp_rank_00" / "model_optim_rng.pt"
    contents = torch.load(path, weights_only=False)
    contents["checkpoint_version"] = version
    torch.save(contents, path)
    with pytest.raises(CheckpointError, match=f"checkpoint_version {version}, expected 3.0"):
        open_source(root)
