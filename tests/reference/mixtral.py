"""An oracle: the forward pass of Mixtral in plain torch, from a Hugging Face state dict with its published names.

It shares no code with the library, the engine or transformers, is written for reading rather than speed, and computes
in the dtype of the weights. Tests hold the library against it and it against transformers (`test_oracle.py`).

Shapes: B batch, S sequence, H hidden, N heads, G key/value heads, D head dim, E experts, T = B * S tokens,
V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim (Zhang and Sennrich 2019), the mean of squares in fp32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotate(x_bnsd: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of the pairs (i, i + D/2): at position s by s * theta^(-2i/D)."""
    size, half = x_bnsd.shape[-1], x_bnsd.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) * 2 / size)
    angle = torch.arange(x_bnsd.shape[-2], dtype=torch.float64)[:, None] * frequency  # [S, D/2]
    cos, sin = angle.cos().to(x_bnsd.dtype), angle.sin().to(x_bnsd.dtype)
    left, right = x_bnsd[..., :half], x_bnsd[..., half:]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def attention(x: Tensor, weights: Weights, prefix: str, config: Any) -> Tensor:
    """Causal self-attention of [B, S, H]; every group of N / G query heads shares one key/value head."""
    batch, length, _ = x.shape
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def project(name: str, count: int) -> Tensor:
        return (x @ weights[f"{prefix}.{name}.weight"].T).view(batch, length, count, size).transpose(1, 2)

    q = rotate(project("q_proj", heads), config.rope_theta)
    k = rotate(project("k_proj", groups), config.rope_theta).repeat_interleave(heads // groups, dim=1)
    v = project("v_proj", groups).repeat_interleave(heads // groups, dim=1)
    scores = q @ k.transpose(-1, -2) / size**0.5  # [B, N, S, S]
    place = torch.arange(length)
    distance = place[:, None] - place[None, :]  # of a query behind a key
    hidden = distance < 0
    if config.sliding_window is not None:
        hidden |= distance >= config.sliding_window
    probabilities = scores.masked_fill(hidden, float("-inf")).float().softmax(-1).to(x.dtype)
    mixed = (probabilities @ v).transpose(1, 2).reshape(batch, length, heads * size)
    return mixed @ weights[f"{prefix}.o_proj.weight"].T


def experts(x: Tensor, weights: Weights, prefix: str, config: Any) -> Tensor:
    """The sparse feed-forward of [B, S, H]: of each token's router probabilities the largest k, scaled to sum to 1."""
    tokens = x.reshape(-1, x.shape[-1])  # [T, H]
    router = (tokens @ weights[f"{prefix}.gate.weight"].T).float().softmax(-1)  # [T, E]
    share, chosen = router.topk(config.num_experts_per_tok, dim=-1)  # [T, k]
    share = (share / share.sum(-1, keepdim=True)).to(x.dtype)
    out = torch.zeros_like(tokens)
    for expert in range(config.num_local_experts):
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        w1, w2, w3 = (weights[f"{prefix}.experts.{expert}.w{n}.weight"] for n in (1, 2, 3))
        mine = tokens[token]
        value = (torch.nn.functional.silu(mine @ w1.T) * (mine @ w3.T)) @ w2.T
        out.index_add_(0, token, value * share[token, slot, None])
    return out.view_as(x)


def forward(weights: Weights, ids: Tensor, config: Any) -> Tensor:
    """Logits [B, S, V] of token ids [B, S]. `config` has Hugging Face's field names (`MixtralConfig` will do)."""
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        normed = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"], config.rms_norm_eps)
        x = x + attention(normed, weights, f"{prefix}.self_attn", config)
        normed = rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"], config.rms_norm_eps)
        x = x + experts(normed, weights, f"{prefix}.block_sparse_moe", config)
    x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return x @ weights[head].T


def loss(weights: Weights, ids: Tensor, config: Any) -> Tensor:
    """Mean next-token cross entropy in nats of ids [B, S + 1]: S predictions a row."""
    logits = forward(weights, ids[:, :-1], config)
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
