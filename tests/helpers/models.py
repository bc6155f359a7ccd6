"""Small Hugging Face Mixtrals with every parameter random, norms included, so that a forgotten tensor shows."""

from pathlib import Path
from typing import Any

import torch

TINY = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}


def tiny_hf_mixtral(directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0, max_shard_size: str = "5GB",
                    **overrides: Any) -> Path:
    """Save a tiny random MixtralForCausalLM with `transformers` and return its directory.

    `overrides` are fields of `transformers.MixtralConfig`; `TINY` has the defaults.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    model = MixtralForCausalLM(MixtralConfig(**(TINY | {"tie_word_embeddings": False} | overrides))).to(dtype)
    randomize(model, seed)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return Path(directory)


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter: norms around 1 but away from it, matrices small enough to keep activations tame."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            value = 1 + 0.3 * noise if parameter.dim() == 1 else 0.1 * noise
            parameter.copy_(value)
