"""Causal attention through torch's scaled_dot_product_attention: flash kernels on GPU and CPU, no s x s matrix.

It takes the place of the engine's `DotProductAttention` where transformer-engine is absent. Sequences packed one after
another into one row (`PackedSeqParams`, format "thd") attend within themselves only.

Context parallelism of C ranks: the engine's, in which a sequence has 2 C chunks and rank r chunks r and 2 C - 1 - r, so
that all have as many scores to compute. Each rank gathers keys and values of the whole sequence.

Shape suffixes: s query length, k key length, b batch, n query heads of this rank, g query groups of this rank, d head,
t tokens of all packed sequences (of this rank).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
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
        if config.attention_dropout:
            raise ConfigError(f"--attention-dropout {config.attention_dropout}: Mixtral has none; set it to 0")
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.window = engine.sliding_window(config.window_size)  # keys, the query's own included
        self.varlen_kernel = config.attention_backend == AttnBackend.flash
        self.cp = None  # the group that shares a sequence, if any
        if config.context_parallel_size > 1:
            self.cp = (pg_collection or ProcessGroupCollection.use_mpu_process_groups()).cp

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
        if self.cp is not None:
            rows = (x.transpose(0, 1).flatten(0, 1) for x in (query_sbnd, key_kbgd, value_kbgd))
            out = self._over_ranks(*rows, lengths=[s * self.cp.size()] * b)
            return out.unflatten(0, (b, s)).transpose(0, 1)
        if self._windowed(key_kbgd.shape[0]) and s == key_kbgd.shape[0] and gpu.has_flash(query_sbnd):
            return self._within_window(query_sbnd, key_kbgd, value_kbgd)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query_sbnd, key_kbgd, value_kbgd))
        return self._attend(q, k, v).permute(2, 0, 1, 3).reshape(s, b, -1)

    def _attend(self, q_bnsd: torch.Tensor, k_bgkd: torch.Tensor, v_bgkd: torch.Tensor) -> torch.Tensor:
        """[b, n, s, d]. Query heads of one group read the same keys; the kernels do not repeat them in memory."""
        s, k = q_bnsd.shape[2], k_bgkd.shape[2]
        windowed = self._windowed(k)
        plain = s == k and not windowed
        like = q_bnsd.device, q_bnsd.dtype
        mask = None if plain or (s == 1 and not windowed) else _mask(s, k, self.window, like)
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
        return self._flash(*rows, (bounds, bounds), (s, s)).view(b, s, -1).transpose(0, 1)

    def _flash(self, q_tnd: torch.Tensor, k_tgd: torch.Tensor, v_tgd: torch.Tensor,
               bounds: tuple[torch.Tensor, torch.Tensor], longest: tuple[int, int]) -> torch.Tensor:
        """[t, n * d]: each sequence for itself, its queries and its keys between two `bounds` of theirs, in one call.
        The last query of a sequence sees its last key.
        """
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q_tnd, k_tgd, v_tgd, *bounds, *longest, scale=self.scale,
                           window_size=engine.window_size(self.window) or (-1, 0),
                           enable_gqa=q_tnd.shape[1] != k_tgd.shape[1]).flatten(1)

    def _packed(self, q_tnd: torch.Tensor, k_tgd: torch.Tensor, v_tgd: torch.Tensor,
                packed: PackedSeqParams) -> torch.Tensor:
        """[t, n * d]. Padding behind a packed sequence belongs to it: no token in front of it can see it."""
        bounds = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
        t = q_tnd.shape[0] * (1 if self.cp is None else self.cp.size())
        lengths = _lengths(packed, bounds, t)
        if self.cp is not None:
            return self._over_ranks(q_tnd, k_tgd, v_tgd, lengths)
        longest = max(lengths, default=0)
        if (self.varlen_kernel or self._windowed(longest)) and gpu.has_flash(q_tnd):
            return self._flash(q_tnd, k_tgd, v_tgd, (bounds, bounds), (longest, longest))
        # split, not slices: the backward of each slice would fill a gradient of the whole row.
        parts = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q_tnd, k_tgd, v_tgd)), strict=True)
        whole = torch.cat([self._attend(*part) for part in parts if part[0].shape[2]], dim=2)
        return whole[0].transpose(0, 1).reshape(t, -1)

    def _over_ranks(self, q_tnd: torch.Tensor, k_tgd: torch.Tensor, v_tgd: torch.Tensor,
                    lengths: Sequence[int]) -> torch.Tensor:
        """[t, n * d]: of each sequence this rank's two chunks, each of which attends to the keys up to its own end.

        `lengths` are those of the whole sequences. `DataError` where one has no 2 C equal chunks.
        """
        ranks, rank = self.cp.size(), self.cp.rank()
        if wrong := [length for length in lengths if length % (2 * ranks)]:
            raise DataError(f"sequences of {wrong[:3]} tokens cannot be cut into 2 x {ranks} equal chunks for context "
                            f"parallelism of {ranks}: pad each to a multiple of {2 * ranks}")
        sizes = [length // (2 * ranks) for length in lengths for _ in range(2)]
        # One collective for both; its backward is a reduce-scatter.
        gathered = gather_from_sequence_parallel_region(torch.cat((k_tgd, v_tgd), dim=-1), group=self.cp)
        early_and_late = [part.split(sizes) for part in gathered.chunk(ranks)]  # of each sequence, by rank
        keys = []
        for first in range(0, len(sizes), 2):
            chunks = [part[first] for part in early_and_late] + [part[first + 1] for part in reversed(early_and_late)]
            keys += [chunks[:rank + 1], chunks[:2 * ranks - rank]]
        if gpu.has_flash(q_tnd):
            ends = [len(chunks) * size for chunks, size in zip(keys, sizes, strict=True)]
            k_tgd, v_tgd = torch.cat([chunk for chunks in keys for chunk in chunks]).chunk(2, dim=-1)
            bounds = (_bounds(tuple(sizes), q_tnd.device), _bounds(tuple(ends), q_tnd.device))
            return self._flash(q_tnd, k_tgd, v_tgd, bounds, (max(sizes), max(ends)))
        out = []
        for part_tnd, chunks in zip(q_tnd.split(sizes), keys, strict=True):
            k_tgd, v_tgd = torch.cat(chunks).chunk(2, dim=-1)
            out.append(self._attend(*(x.transpose(0, 1)[None] for x in (part_tnd, k_tgd, v_tgd)))[0].transpose(0, 1))
        return torch.cat(out).flatten(1)


@functools.lru_cache(maxsize=4)
def _mask(s: int, k: int, window: int | None, like: tuple[torch.device, torch.dtype]) -> torch.Tensor:
    """[s, k], added to the scores: 0 where query i (at position k - s + i) may look at key j, else -inf. One for all
    layers: each would keep its own for the backward pass, and one of bits would become numbers in each.
    """
    device, dtype = like
    with torch.inference_mode(False):  # or training could not use it after a generation
        seen = torch.ones(s, k, dtype=torch.bool, device=device).tril(k - s)
        if window is not None:
            seen = seen.triu(k - s - window + 1)
        return torch.zeros(s, k, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


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


@functools.lru_cache(maxsize=16)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 [sequences + 1]; kept, since every layer asks for the same, and a copy to a GPU waits for it."""
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
