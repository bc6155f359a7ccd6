"""Dense models become Mixtrals: what transformers computes with either, what is drawn, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from helpers.models import randomize, tensors_of, tiny_hf_mixtral
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralForCausalLM,
)

from megatron_mixtral.config import MixtralConfig
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.weights.conversion import convert
from megatron_mixtral.weights.edits.upcycle import UpcycledSource, mixtral_of
from megatron_mixtral.weights.formats.hf_sink import HFSink

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False}
DENSE = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "mistral with a window": lambda: MistralForCausalLM(MistralConfig(**SIZES | {"head_dim": 16}, sliding_window=5)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 4}, rms_norm_eps=1e-3)),
    "tied llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"tie_word_embeddings": True}, rope_theta=5e5)),
}


def dense(directory: Path, kind: str = "mistral", dtype: torch.dtype = torch.float32) -> Path:
    model = DENSE[kind]().to(dtype)
    randomize(model, 0)
    model.save_pretrained(directory)
    return directory


def upcycle(directory: Path, target: Path, *sizes: int, **options) -> dict[str, torch.Tensor]:
    source = UpcycledSource(directory, *sizes, **options)
    convert(source, HFSink(target), verify=True)
    return tensors_of(target)


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("sizes", [(8, 2), (3, 1), (4, 4)])
def test_a_mixtral_of_equal_experts_computes_what_the_dense_model_did(tmp_path, kind, sizes):
    upcycle(dense(tmp_path / "dense", kind), tmp_path / "mixtral", *sizes, router_std=1.0)
    tokens = torch.arange(40).reshape(2, 20) * 7 % 96
    original = type(DENSE[kind]()).from_pretrained(tmp_path / "dense").eval()
    model, info = MixtralForCausalLM.from_pretrained(tmp_path / "mixtral", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == sizes
    with torch.no_grad():
        ours, theirs = model.eval()(tokens).logits, original(tokens).logits
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_experts_are_exact_copies_and_the_router_follows_the_seed(tmp_path):
    old = tensors_of(dense(tmp_path / "dense", dtype=torch.bfloat16))
    new = upcycle(tmp_path / "dense", tmp_path / "one")
    for layer in range(2):
        for expert in range(8):
            for part, name in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
                assert torch.equal(new[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"],
                                   old[f"model.layers.{layer}.mlp.{name}.weight"])
    rest = [name for name in old if ".mlp." not in name]
    assert len(new) == len(rest) + 2 * (8 * 3 + 1) and all(torch.equal(new[name], old[name]) for name in rest)
    routers = [new[f"model.layers.{layer}.block_sparse_moe.gate.weight"] for layer in range(2)]
    assert all(router.shape == (8, 32) and router.dtype == torch.bfloat16 for router in routers)
    assert not torch.equal(*routers) and 0.015 < torch.cat(routers).float().std() < 0.025
    again, other = upcycle(tmp_path / "dense", tmp_path / "two"), upcycle(tmp_path / "dense", tmp_path / "3", seed=7)
    name = "model.layers.1.block_sparse_moe.gate.weight"
    assert torch.equal(again[name], new[name]) and not torch.equal(other[name], new[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_noise_makes_experts_differ_by_the_share_asked_for(tmp_path, dtype):
    old = tensors_of(dense(tmp_path / "dense", dtype=dtype))
    new = upcycle(tmp_path / "dense", tmp_path / "out", 4, expert_noise=0.25)
    base = old["model.layers.1.mlp.down_proj.weight"].double()
    experts = [new[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"] for expert in range(4)]
    for number, expert in enumerate(experts):
        assert expert.dtype == dtype
        share = (expert.double() - base).square().mean().sqrt() / base.square().mean().sqrt()
        assert 0.23 < share < 0.27
        assert all(not torch.equal(expert, other) for other in experts[:number])
    assert torch.equal(upcycle(tmp_path / "dense", tmp_path / "again", 4, expert_noise=0.25)[
        "model.layers.1.block_sparse_moe.experts.3.w2.weight"], experts[3])


@pytest.mark.parametrize(("change", "words"), [
    ({"model_type": "qwen2"}, "found 'qwen2'"), ({"model_type": "mixtral"}, "expected a dense model's"),
    ({"attention_bias": True}, "attention_bias = True"), ({"mlp_bias": True}, "mlp_bias = True"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"), ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type = 'yarn'")])
def test_what_no_mixtral_computes_is_refused(tmp_path, change, words):
    path = dense(tmp_path / "dense") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=words) as error:
        upcycle(tmp_path / "dense", tmp_path / "out")
    assert str(path) in str(error.value) and not (tmp_path / "out").exists()


def test_sizes_and_tensors_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="num_experts_per_tok 3 exceeds num_local_experts 2"):
        UpcycledSource(dense(tmp_path / "dense"), 2, 3)
    for options in ({"router_std": -1.0}, {"expert_noise": -0.1}, {"seed": -1}, {"expert_noise": float("nan")}):
        with pytest.raises(ConfigError, match="must not be negative"):
            UpcycledSource(tmp_path / "dense", **options)
    with pytest.raises(ConfigError, match="expected a dense model's"):
        UpcycledSource(tiny_hf_mixtral(tmp_path / "mixtral"))
    tensors = tensors_of(tmp_path / "dense")
    for change, words in (({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, "q_proj.bias"),
                          ({"model.layers.1.mlp.up_proj.weight": torch.zeros(47, 32)}, "up_proj.*has shape")):
        save_file(tensors | change, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=words):
            upcycle(tmp_path / "dense", tmp_path / "out")
    del tensors["model.layers.1.mlp.gate_proj.weight"]
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="gate_proj.weight is missing"):
        upcycle(tmp_path / "dense", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "mixtral"]


@pytest.mark.parametrize(("config", "theirs"), [({"model_type": "mistral"}, MistralConfig()),
                                                ({"model_type": "llama", "sliding_window": 77}, LlamaConfig())])
def test_keys_that_are_absent_mean_what_transformers_says(tmp_path, config, theirs):
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = mixtral_of(tmp_path)
    assert ours == MixtralConfig(
        **{name: getattr(theirs, name) for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
            "initializer_range", "bos_token_id", "eos_token_id")},
        rope_theta=theirs.rope_parameters["rope_theta"], sliding_window=getattr(theirs, "sliding_window", None))
