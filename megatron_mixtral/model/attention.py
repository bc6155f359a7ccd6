"""Causal attention through torch's scaled_dot_product_attention: flash kernels on GPU and CPU, no s x s matrix.

It takes the place of the engine's `DotProductAttention` where transformer-engine is absent.

Shape suffixes: s query length, k key length, b batch, n query heads of this rank, g query groups of this rank, d head.
"""

import math
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mixtral.errors import ConfigError


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
        # The engine counts keys to the left of the query, the query itself not included.
        self.window = None if config.window_size is None else config.window_size[0] + 1

    def forward(self, query_sbnd: torch.Tensor, key_kbgd: torch.Tensor, value_kbgd: torch.Tensor,
                attention_mask: torch.Tensor | None = None, attn_mask_type: AttnMaskType | None = None,
                attention_bias: torch.Tensor | None = None, packed_seq_params: PackedSeqParams | None = None,
                **kwargs: Any) -> torch.Tensor:
        """-> [s, b, n * d]. The mask is causal, aligned to the last key; a given `attention_mask` is not read."""
        if packed_seq_params is not None:
            raise ConfigError("packed sequences need transformer-engine's attention; install the extra [te]")
        s, b = query_sbnd.shape[:2]
        k = key_kbgd.shape[0]
        q, key, value = (x.permute(1, 2, 0, 3) for x in (query_sbnd, key_kbgd, value_kbgd))
        windowed = self.window is not None and k > self.window
        plain = s == k and not windowed
        mask = None if plain or (s == 1 and not windowed) else self._mask(s, k, q.device)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, key, value, attn_mask=mask, is_causal=plain, scale=self.scale, enable_gqa=q.shape[1] != key.shape[1])
        return out.permute(2, 0, 1, 3).reshape(s, b, -1)

    def _mask(self, s: int, k: int, device: torch.device) -> torch.Tensor:
        """[s, k], True where query i (at position k - s + i) may look at key j."""
        query = torch.arange(k - s, k, device=device)[:, None]
        key = torch.arange(k, device=device)[None, :]
        allowed = key <= query
        return allowed if self.window is None else allowed & (query - key < self.window)
