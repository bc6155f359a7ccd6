"""Rotary positions on a GPU: one function of one pass, its sines and cosines made once, and no wait in a packed row.

The engine makes sines and cosines anew in every layer, for queries and for keys, and turns them by six passes over
memory. Of a packed row it asks the device for the lengths of the sequences, and waits.

Shape suffixes: s sequence, b batch, n heads, d head, t tokens of all packed sequences.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from megatron_mixtral.runtime.replacements import Fix, around, source_has


def rotated(x: Tensor, freqs_s11d: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """x [s, b, n, d] turned by its positions, or [t, n, d] of sequences that end at `cu_seqlens` [sequences + 1]."""
    cos, sin = tables(freqs_s11d, x.dtype)
    if cu_seqlens is not None:
        at = positions(cu_seqlens, x.shape[0])
        cos, sin = cos[:, 0].index_select(0, at), sin[:, 0].index_select(0, at)
    return _Rotation.apply(x, cos, sin)


def tables(freqs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the engine's table of angles, which it keeps from step to step: they are kept with it."""
    if getattr(freqs, "rotations", (None,))[0] != dtype:
        freqs.rotations = (dtype, freqs.cos().to(dtype), freqs.sin().to(dtype))
    return freqs.rotations[1:]


def positions(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[t]: the place of each token in its own sequence."""
    place = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return place - cu_seqlens[torch.searchsorted(cu_seqlens, place, right=True) - 1]


class _Rotation(torch.autograd.Function):
    """Keeps nothing of x: its gradient is the gradient, turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _compiled()(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _compiled()(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@functools.cache
def _compiled() -> Any:
    from megatron.core import jit  # asked when it is needed: --disable-jit-fuser comes after the engine's import

    return jit.jit_fuser(_turn)


def _rotated_on_gpu(original: Any, t: Tensor, freqs: Tensor, config: Any, cu_seqlens: Tensor | None = None,
                    mscale: float = 1.0, cp_group: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    plain = not (config.apply_rope_fusion or config.rotary_interleaved or config.multi_latent_attention)
    whole = freqs.shape[-1] == t.shape[-1] and (cp_group is None or cp_group.size() == 1)
    if t.is_cuda and plain and whole and mscale == 1.0 and not args and not kwargs.get("mla_rotary_interleaved"):
        return rotated(t, freqs, cu_seqlens)
    return original(t, freqs, config, cu_seqlens, mscale, cp_group, *args, **kwargs)


FIX = Fix(
    name="rotary-positions",
    symptom="the host waits for the device four times in every layer of a packed row, and rotary positions take six "
            "passes over memory",
    cause="apply_rotary_pos_emb makes sines and cosines in every call, runs uncompiled, and reads lengths by item()",
    versions="0.19.2",
    remove_when="apply_rotary_pos_emb without transformer-engine is one kernel and reads nothing back",
    needed=source_has("megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_thd",
                      "cu_seqlens[-1].item()"),
    apply=around("megatron.core.transformer.attention:apply_rotary_pos_emb", _rotated_on_gpu),
)
