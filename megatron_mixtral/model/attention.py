"""Causal attention through torch's scaled_dot_product_attention: flash kernels on GPU and CPU, no s x s matrix.

It takes the place of the engine's `DotProductAttention` where transformer-engine is absent. Sequences packed one after
another into one row (`PackedSeqParams`, format "thd") attend within themselves only.

Shape suffixes: s query length, k key length, b batch, n query heads of this rank, g query groups of this rank, d head,
t tokens of all packed sequences.
"""

import math
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mixtral.config import engine
from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.runtime import gpu


class CausalAttention(torch.nn.Module):
    """Grouped-query causal attention without dropout, optionally within a sliding window."""

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType,
                 attention_type: str, cp_comm_type: str | None = None, softmax_scale: float | None = None,
                 pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise ConfigError(f"--context-parallel-size {config.context_parallel_size} needs transformer-engine; "
                              "install the extra [te], or set it to 1")
        if config.attention_dropout:
            raise ConfigError(f"--attention-dropout {config.attention_dropout}: Mixtral has none; set it to 0")
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.window = engine.sliding_window(config.window_size)  # keys, the query's own included
        self.varlen_kernel = config.attention_backend == AttnBackend.flash

    def forward(self, query_sbnd: torch.Tensor, key_kbgd: torch.Tensor, value_kbgd: torch.Tensor,
                attention_mask: torch.Tensor | None = None, attn_mask_type: AttnMaskType | None = None,
                attention_bias: torch.Tensor | None = None, packed_seq_params: PackedSeqParams | None = None,
                **kwargs: Any) -> torch.Tensor:
        """-> [s, b, n * d]. The mask is causal, aligned to the last key; a given `attention_mask` is not read.

        With `packed_seq_params` in format "thd" the arguments are [t, n, d] and [t, g, d], the result is [t, n * d].
        `DataError` where the packed sequences do not fill the row.
        """
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            return self._packed(query_sbnd, key_kbgd, value_kbgd, packed_seq_params)
        s, b = query_sbnd.shape[:2]
        if self._windowed(key_kbgd.shape[0]) and s == key_kbgd.shape[0] and gpu.has_flash(query_sbnd):
            return self._within_window(query_sbnd, key_kbgd, value_kbgd)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query_sbnd, key_kbgd, value_kbgd))
        return self._attend(q, k, v).permute(2, 0, 1, 3).reshape(s, b, -1)

    def _attend(self, q_bnsd: torch.Tensor, k_bgkd: torch.Tensor, v_bgkd: torch.Tensor) -> torch.Tensor:
        """[b, n, s, d]. Query heads of one group read the same keys; the kernels do not repeat them in memory."""
        s, k = q_bnsd.shape[2], k_bgkd.shape[2]
        windowed = self._windowed(k)
        plain = s == k and not windowed
        mask = None if plain or (s == 1 and not windowed) else self._mask(s, k, q_bnsd.device)
        return torch.nn.functional.scaled_dot_product_attention(
            q_bnsd, k_bgkd, v_bgkd, attn_mask=mask, is_causal=plain, scale=self.scale,
            enable_gqa=q_bnsd.shape[1] != k_bgkd.shape[1])

    def _windowed(self, keys: int) -> bool:
        return self.window is not None and keys > self.window

    def _within_window(self, q_sbnd: torch.Tensor, k_sbgd: torch.Tensor, v_sbgd: torch.Tensor) -> torch.Tensor:
        """[s, b, n * d], by the one flash kernel of torch's that has a window: SDPA would need a mask, which excludes
        flash and keeps s x s numbers a head.
        """
        s, b = q_sbnd.shape[:2]
        rows = (x.transpose(0, 1).flatten(0, 1) for x in (q_sbnd, k_sbgd, v_sbgd))
        bounds = torch.arange(0, (b + 1) * s, s, device=q_sbnd.device, dtype=torch.int32)
        return self._flash(*rows, bounds, s).view(b, s, -1).transpose(0, 1)

    def _flash(self, q_tnd: torch.Tensor, k_tgd: torch.Tensor, v_tgd: torch.Tensor, bounds: torch.Tensor,
               longest: int) -> torch.Tensor:
        """[t, n * d]: each sequence between two bounds for itself."""
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q_tnd, k_tgd, v_tgd, bounds, bounds, longest, longest, scale=self.scale,
                           window_size=engine.window_size(self.window) or (-1, 0),
                           enable_gqa=q_tnd.shape[1] != k_tgd.shape[1]).flatten(1)

    def _packed(self, q_tnd: torch.Tensor, k_tgd: torch.Tensor, v_tgd: torch.Tensor,
                packed: PackedSeqParams) -> torch.Tensor:
        """[t, n * d]. Padding behind a packed sequence belongs to it: no token in front of it can see it."""
        bounds = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
        t = q_tnd.shape[0]
        lengths = _lengths(packed, bounds, t)
        longest = max(lengths, default=0)
        if (self.varlen_kernel or self._windowed(longest)) and gpu.has_flash(q_tnd):
            return self._flash(q_tnd, k_tgd, v_tgd, bounds, longest)
        # split, not slices: the backward of each slice would fill a gradient of the whole row.
        parts = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q_tnd, k_tgd, v_tgd)), strict=True)
        whole = torch.cat([self._attend(*part) for part in parts if part[0].shape[2]], dim=2)
        return whole[0].transpose(0, 1).reshape(t, -1)

    def _mask(self, s: int, k: int, device: torch.device) -> torch.Tensor:
        """[s, k], True where query i (at position k - s + i) may look at key j."""
        causal = torch.ones(s, k, dtype=torch.bool, device=device).tril(k - s)
        return causal if self.window is None else causal.triu(k - s - self.window + 1)


def _lengths(packed: PackedSeqParams, bounds: torch.Tensor, tokens: int) -> list[int]:
    """Of the packed sequences. On a GPU the host waits for them, so the first layer notes them for the others."""
    if "lengths" not in vars(packed):
        ends = [0, *bounds.tolist()]  # the first bound has to be 0: a sequence of nothing
        vars(packed)["lengths"] = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    first, *lengths = packed.lengths
    if first != 0 or sum(lengths) != tokens or min(lengths, default=0) < 0:
        raise DataError(f"packed sequences of lengths {lengths} do not fill a row of {tokens} tokens: cu_seqlens must "
                        "rise from 0 to the length of the row, padding included")
    return lengths
