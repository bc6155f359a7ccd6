"""An oracle: InternLM2's forward pass in plain torch, from a state dict with its own names.

It computes with the packed wqkv as the model's published code describes it, group by group: its queries, its key, its
value; so it knows nothing of a Llama. Shapes as in `reference/mixtral.py`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from reference.mixtral import rms_norm, rotate
from torch import Tensor


def attention(x: Tensor, weights: Mapping[str, Tensor], prefix: str, config: Mapping[str, Any]) -> Tensor:
    """Causal self-attention of [B, S, H], one group of query heads after the other."""
    batch, length, hidden = x.shape
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size, each = hidden // heads, heads // groups
    packed = (x @ weights[f"{prefix}.wqkv.weight"].T).view(batch, length, groups, (each + 2) * size)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    found = []
    for group in range(groups):
        *queries, key, value = packed[:, :, group].split(size, dim=-1)
        key = rotate(key, config["rope_theta"])
        for query in queries:
            scores = rotate(query, config["rope_theta"]) @ key.transpose(-1, -2) / size**0.5
            found.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ value)
    return torch.cat(found, dim=-1) @ weights[f"{prefix}.wo.weight"].T


def forward(weights: Mapping[str, Tensor], ids: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Logits [B, S, V] of token ids [B, S]. `config` is the model's config.json."""
    x, eps = weights["model.tok_embeddings.weight"][ids], config["rms_norm_eps"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        x = x + attention(rms_norm(x, weights[f"{prefix}.attention_norm.weight"], eps), weights,
                          f"{prefix}.attention", config)
        normed = rms_norm(x, weights[f"{prefix}.ffn_norm.weight"], eps)
        w1, w2, w3 = (weights[f"{prefix}.feed_forward.w{number}.weight"] for number in (1, 2, 3))
        x = x + (torch.nn.functional.silu(normed @ w1.T) * (normed @ w3.T)) @ w2.T
    return rms_norm(x, weights["model.norm.weight"], eps) @ weights["output.weight"].T
