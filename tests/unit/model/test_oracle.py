"""The reference of the tests against transformers: logits, loss and gradients of one saved model."""

import dataclasses

import pytest
import torch
import transformers
from reference import mixtral
from safetensors.torch import load_file

from megatron_mixtral.config import MixtralConfig

SMALL = MixtralConfig(vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
                      num_key_value_heads=2, num_local_experts=5, num_experts_per_tok=2, rope_theta=1e4,
                      rms_norm_eps=1e-4, initializer_range=0.15)  # fmt: skip


@pytest.mark.parametrize("config", [
    SMALL,
    dataclasses.replace(SMALL, head_dim=16, num_experts_per_tok=3, rope_theta=1e6),
    dataclasses.replace(SMALL, sliding_window=7),
    dataclasses.replace(SMALL, tie_word_embeddings=True),
], ids=["plain", "head_dim", "window", "tied"])
def test_oracle_equals_transformers(config, tmp_path):
    torch.manual_seed(5)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**config.to_hf_dict("float32")))
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones would hide a forgotten weight
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.save_pretrained(tmp_path)  # writes the published names
    weights = {name: value.requires_grad_() for name, value in load_file(tmp_path / "model.safetensors").items()}
    ids = torch.randint(config.vocab_size, (2, 20))
    expected = model(ids, use_cache=False).logits
    logits = mixtral.forward(weights, ids, config)
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)

    reference = model(ids, labels=ids, use_cache=False).loss
    value = mixtral.loss(weights, ids, config)
    torch.testing.assert_close(value, reference, rtol=0, atol=1e-5)
    reference.backward()
    value.backward()
    ours = torch.sqrt(sum(weight.grad.square().sum() for weight in weights.values()))
    theirs = torch.sqrt(sum(parameter.grad.square().sum() for parameter in model.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
