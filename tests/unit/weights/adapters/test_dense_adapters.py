"""Adapters of dense models: PEFT reads them under the model's own names, and merged they compute the same."""

import json
from pathlib import Path

import pytest
import torch
from helpers.dense import reference, tiny_dense
from helpers.models import tensors_of
from safetensors.torch import save_file

from megatron_mixtral.config import AdapterConfig, MixtralConfig
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.weights import convert, hf_tensors, open_sink, open_source
from megatron_mixtral.weights.adapters import FreshAdapters
from megatron_mixtral.weights.edits import MergedSource
from megatron_mixtral.weights.protocols import Fragment

IDS = torch.arange(40).reshape(2, 20) * 7 % 96


class Trained(FreshAdapters):
    """Adapters with a B that is not zero."""

    def fragments(self, tensor) -> list[Fragment]:
        draw = torch.Generator().manual_seed(sum(map(ord, tensor.name)))
        values = 0.15 * torch.randn(tensor.view, generator=draw)
        return [Fragment(0, tensor.view[tensor.rule.shard_dim], values.numpy().view("<u4"), "float32", "here")]


def trained(hf: Path, **options) -> Trained:
    return Trained(AdapterConfig.of(MixtralConfig.from_hf_dir(hf), rank=4, alpha=8.0, base_name=str(hf), **options), 1)


@pytest.mark.parametrize("kind", ["mistral", "tied llama"])
def test_peft_and_the_merged_model_say_the_same(kind, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    hf = tiny_dense(tmp_path / "hf", kind)
    adapters = trained(hf)
    convert(adapters, open_sink(tmp_path / "peft", "peft", adapter_format="v5"), verify=True)
    said = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert said["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
    convert(MergedSource(open_source(hf), open_source(tmp_path / "peft")), open_sink(tmp_path / "merged"), verify=True)
    with torch.no_grad():
        plain = reference(kind)(IDS).logits
        beside = PeftModel.from_pretrained(reference(kind), tmp_path / "peft").eval()(IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(IDS).logits
    assert (beside - plain).abs().max() > 0.1
    assert (merged - beside).abs().max() < 1e-5
    back = open_source(tmp_path / "peft")
    assert back.config == adapters.config
    tensors = tensors_of(tmp_path / "peft")
    assert len(tensors) == len(hf_tensors(adapters.config)) == 4 * 7 * 2
    save_file({name: one for name, one in tensors.items() if "gate_proj" not in name},
              tmp_path / "peft" / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"peft/adapter_config.json: .*w1 and w3 \(gate and up\) are one matrix"):
        open_source(tmp_path / "peft")


def test_an_internlm2_has_no_adapters_of_q_k_and_v_alone(tmp_path):
    hf = tiny_dense(tmp_path / "hf", "internlm2")
    with pytest.raises(ConfigError, match="internlm2 has the three in one matrix"):
        convert(trained(hf), open_sink(tmp_path / "peft", "peft"))
    rest = trained(hf, targets=("o_proj", "w1", "w2", "w3"))
    convert(rest, open_sink(tmp_path / "peft", "peft"), verify=True)
    assert {name.split(".")[-3] for name in tensors_of(tmp_path / "peft")} == {"wo", "w1", "w2", "w3"}
    assert open_source(tmp_path / "peft").config == rest.config
    # Merging works for all of them: W + alpha / rank * B A, the three of a group after one another.
    convert(MergedSource(open_source(hf), trained(hf)), open_sink(tmp_path / "merged"), verify=True)
    name, old, new = "model.layers.2.attention.wqkv.weight", tensors_of(hf), tensors_of(tmp_path / "merged")
    matrices = {letter.name: torch.from_numpy(trained(hf).fragments(letter)[0].data.view("<f4")).reshape(letter.shape)
                for letter in hf_tensors(trained(hf).config).values() if letter.layer == 2}
    change = (new[name] - old[name]).view(2, 4, 8, 32)
    for rows, linear in ((slice(0, 2), "q"), (slice(2, 3), "k"), (slice(3, 4), "v")):
        a, b = (matrices[f"base_model.model.model.layers.2.self_attn.{linear}_proj.lora_{letter}.weight"]
                for letter in "AB")
        torch.testing.assert_close(change[:, rows].reshape(-1, 32), 2.0 * b @ a, rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="and has no router"):
        trained(hf, targets=("gate",))
