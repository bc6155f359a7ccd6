"""Keys and values of what was read: one slot for each running continuation, and attention over them.

`stage` opens the engine's layers to it. Memory is taken in whole pages, in which the kernel for GPUs reads a cache.

Shape suffixes: t tokens of this step, n query heads and g query groups of this rank, d head, s slots, l places of a
slot, k keys.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_mixtral.config import MixtralConfig, ParallelLayout, engine
from megatron_mixtral.planning import CacheShape

_PAGE = CacheShape.PAGE


class Row(NamedTuple):
    """Tokens of one slot that a step reads: `count` of them, the first at position `start`."""

    slot: int
    start: int
    count: int


def cache_bytes(config: MixtralConfig, layout: ParallelLayout, slots: int, length: int, element_size: int) -> int:
    """Bytes on the rank with most layers."""
    layers = max(len(layout.layers_of(stage, config.num_hidden_layers)) for stage in range(layout.pp))
    return CacheShape(slots, length).size(config, layout.tp, layers, element_size)


class Cache:
    """Slots of one rank: [s, l, g, d] keys and values of each of its layers."""

    def __init__(self, layers: int, slots: int, length: int, groups: int, head_dim: int, *, scale: float,
                 window: int | None, dtype: torch.dtype, device: torch.device) -> None:
        """`window` is the number of keys that a token sees, its own included. Allocates at once."""
        shape = (layers, slots, CacheShape(slots, length).places, groups, head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.scale, self.window, self.device = scale, window, device

    def begin(self, rows: Sequence[Row], padded: int) -> None:
        """Say what the step reads: the rows' tokens, one row behind the other, and then padding up to `padded`."""
        self.tokens = sum(row.count for row in rows)
        positions = [place for row in rows for place in range(row.start, row.start + row.count)]
        slots = [row.slot for row in rows for _ in range(row.count)]
        self.positions_t = torch.tensor([*positions, *[0] * (padded - self.tokens)], device=self.device)  # of padding 0
        self._place = torch.tensor(slots, dtype=torch.int64, device=self.device), self.positions_t[:self.tokens]
        ends = list(accumulate((row.count for row in rows), initial=0))
        # Rows of one token are attended to together, longer ones one by one: (row, its place among the tokens).
        self._long = [(row, at) for row, at in zip(rows, ends, strict=False) if row.count > 1]
        self._plan_single([(row, at) for row, at in zip(rows, ends, strict=False) if row.count == 1])
        if rows and self.device.type == "cuda":
            self._plan_pages(rows, ends)

    def _plan_single(self, single: list[tuple[Row, int]]) -> None:
        """Over slots 0 up to the last one that is in use, as a view; the mask takes out what a slot does not hold."""
        self._single_slots = max((row.slot for row, _ in single), default=-1) + 1
        if not single:
            return
        slots, places = [row.slot for row, _ in single], [at for _, at in single]
        last = dict.fromkeys(range(self._single_slots), 0) | {row.slot: row.start for row, _ in single}
        keys = max(last.values()) + 1
        seen = self._mask(torch.tensor([*last.values()])[:, None], keys)[:, None]  # [s, 1, 1, k]
        bias = None if seen.all() else torch.zeros(seen.shape, dtype=self.keys.dtype).masked_fill_(~seen, -torch.inf)
        self._single_keys, self._single_bias = keys, None if bias is None else bias.to(self.device)
        # Where the step's tokens are the slots' in their order, there is nothing to take apart.
        self._single_all = slots == places == list(range(len(self.positions_t)))
        self._single_slot, self._single_at = (torch.tensor(one, device=self.device) for one in (slots, places))

    def _plan_pages(self, rows: Sequence[Row], ends: list[int]) -> None:
        pages = self.keys.shape[2] // _PAGE
        first = torch.tensor([[row.slot * pages] for row in rows], dtype=torch.int32)
        self._page_table = (first + torch.arange(pages, dtype=torch.int32)).to(self.device)
        self._row_ends = torch.tensor(ends, dtype=torch.int32, device=self.device)
        self._row_keys = torch.tensor([row.start + row.count for row in rows], dtype=torch.int32, device=self.device)
        self._longest = max(row.count for row in rows), max(row.start + row.count for row in rows)

    def _mask(self, positions_q: torch.Tensor, keys: int) -> torch.Tensor:
        """[*positions, keys], True where a token at that position may look."""
        places = torch.arange(keys)
        seen = places <= positions_q[..., None]
        return seen if self.window is None else seen & (places > positions_q[..., None] - self.window)

    def copy(self, source: int, slot: int, count: int) -> None:
        """The first `count` tokens of a slot to another one."""
        for held in (self.keys, self.values):
            held[:, slot, :count] = held[:, source, :count]

    def clear(self, slot: int) -> None:
        """Forget what is no number: masked or not, one in a slot's rest would make its next request's sums none."""
        for held in (self.keys, self.values):
            held[:, slot] = 0

    def write(self, layer: int, key_tgd: torch.Tensor, value_tgd: torch.Tensor) -> None:
        """Keep the step's keys, already rotated to their positions, and values; padding is left out."""
        self.keys[layer][self._place] = key_tgd[:self.tokens]
        self.values[layer][self._place] = value_tgd[:self.tokens]

    def attend(self, layer: int, query_tnd: torch.Tensor) -> torch.Tensor:
        """[t, n * d]: each token over what its slot holds up to itself. Padding gets zeros."""
        keys_slgd, values_slgd = self.keys[layer], self.values[layer]
        in_pages = self.tokens and query_tnd.is_cuda and query_tnd.dtype in (torch.bfloat16, torch.float16)
        if self._single_slots and self._single_all and not in_pages:
            return self._attend_single(query_tnd, keys_slgd, values_slgd).flatten(1)
        out_tnd = torch.zeros_like(query_tnd)
        if in_pages:
            out_tnd[:self.tokens] = self._attend_pages(query_tnd[:self.tokens], keys_slgd, values_slgd)
            return out_tnd.flatten(1)
        if self._single_slots:
            query_snd = query_tnd.new_zeros(self._single_slots, *query_tnd.shape[1:])
            query_snd[self._single_slot] = query_tnd[self._single_at]
            out_tnd[self._single_at] = self._attend_single(query_snd, keys_slgd, values_slgd)[self._single_slot]
        for row, at in self._long:
            here, end = slice(at, at + row.count), row.start + row.count
            held = [one[row.slot, None, :end] for one in (keys_slgd, values_slgd)]
            plain = row.start == 0 and (self.window is None or end <= self.window)
            mask = None if plain else self._mask(torch.arange(row.start, end), end).to(self.device)
            out_tnd[here] = self._kernel(query_tnd[None, here], *held, mask=mask, is_causal=plain)[0]
        return out_tnd.flatten(1)

    def _attend_single(self, query_snd: torch.Tensor, keys_slgd: torch.Tensor,
                       values_slgd: torch.Tensor) -> torch.Tensor:
        """[s, n, d]: one token of each slot. Query heads of a group read the same keys, as if they were its queries."""
        keys, values = (one[:self._single_slots, :self._single_keys].transpose(1, 2)
                        for one in (keys_slgd, values_slgd))
        return scaled_dot_product_attention(query_snd.unflatten(1, (keys.shape[1], -1)), keys, values,
                                            attn_mask=self._single_bias, scale=self.scale).flatten(1, 2)

    def _kernel(self, query_bqnd: torch.Tensor, key_bkgd: torch.Tensor, value_bkgd: torch.Tensor, *,
                mask: torch.Tensor | None, is_causal: bool = False) -> torch.Tensor:
        q, k, v = (one.transpose(1, 2) for one in (query_bqnd, key_bkgd, value_bkgd))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=self.scale,
                                            enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    def _attend_pages(self, query_tnd: torch.Tensor, keys_slgd: torch.Tensor,
                      values_slgd: torch.Tensor) -> torch.Tensor:
        """On a GPU: all rows in one kernel, which gives a row the same bits whatever stands beside it (num_splits)."""
        from torch.nn.attention.varlen import varlen_attn

        keys, values = (one.view(-1, _PAGE, *one.shape[2:]) for one in (keys_slgd, values_slgd))
        return varlen_attn(query_tnd, keys, values, self._row_ends, None, *self._longest, scale=self.scale,
                           window_size=engine.window_size(self.window) or (-1, 0),
                           enable_gqa=query_tnd.shape[1] != keys.shape[2], seqused_k=self._row_keys,
                           block_table=self._page_table, num_splits=1)
