"""Tokens to the order of their experts and back, without atomic additions: the same bits in every run.

Each token goes to k experts. The engine sends rows by `index_select`, whose gradient adds atomically, and brings them
back by `scatter_add_`, which does so too; and where nothing is to be sorted, it copies all rows in their order. Here
the way back, of tokens and of gradients, gathers a token's k rows and adds them up.

Shape suffixes: t tokens, k experts a token, r = t k rows, h hidden, e experts.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_mixtral.runtime.replacements import Fix, Replacements, source_has


class _Spread(torch.autograd.Function):
    """[t, h] -> [r, h]: row j is token `token_r`[j]; `rows_tk` says where each token's rows are."""

    @staticmethod
    def forward(ctx: Any, x_th: Tensor, token_r: Tensor, rows_tk: Tensor) -> Tensor:
        ctx.save_for_backward(rows_tk)
        return x_th.index_select(0, token_r)

    @staticmethod
    def backward(ctx: Any, grad_rh: Tensor) -> tuple[Tensor, None, None]:
        [rows_tk] = ctx.saved_tensors
        return _added_up(grad_rh, rows_tk), None, None


class _Gather(torch.autograd.Function):
    """[r, h] -> [t, h]: the sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, y_rh: Tensor, token_r: Tensor, rows_tk: Tensor) -> Tensor:
        ctx.save_for_backward(token_r)
        return _added_up(y_rh, rows_tk)

    @staticmethod
    def backward(ctx: Any, grad_th: Tensor) -> tuple[Tensor, None, None]:
        [token_r] = ctx.saved_tensors
        return grad_th.index_select(0, token_r), None, None


def _added_up(rows_rh: Tensor, rows_tk: Tensor) -> Tensor:
    return rows_rh.index_select(0, rows_tk.flatten()).view(*rows_tk.shape, -1).sum(1)


def spread(x_th: Tensor, routing_te: Tensor, probs_te: Tensor | None, rows: int) -> tuple[Tensor, Any, Tensor]:
    """(rows in the order of their experts, their probabilities, the token of each row); as the engine's `permute`
    where every token has the same number of experts.
    """
    tokens = x_th.shape[0]
    flat = routing_te.bool().T.reshape(-1).argsort(descending=True, stable=True)[:rows]
    token_r = flat % tokens
    token_r.rows = token_r.argsort(stable=True).view(tokens, -1)
    probs_r = None if probs_te is None else probs_te.T.reshape(-1)[flat]
    return _Spread.apply(x_th, token_r, token_r.rows), probs_r, token_r


def gather(y_rh: Tensor, token_r: Tensor) -> Tensor:
    """The way back; `token_r` is what `spread` gave."""
    return _Gather.apply(y_rh, token_r, token_r.rows)


# -- in the engine's dispatcher -------------------------------------------------------------------------


def _permute(original: Any, tokens: Tensor, routing_map: Tensor, probs: Tensor | None = None,
             num_out_tokens: Any = None, fused: bool = False, drop_and_pad: bool = False, **kwargs: Any) -> tuple:
    # A count that is a tensor is that of a run that drops tokens.
    if not tokens.is_cuda or fused or drop_and_pad or not isinstance(num_out_tokens, int) or kwargs or not len(tokens):
        return original(tokens, routing_map, probs, num_out_tokens, fused, drop_and_pad, **kwargs)
    rows, probs_r, token_r = spread(tokens, routing_map, probs, num_out_tokens)
    return rows, probs_r, token_r, None, None


def _unpermute(original: Any, permuted_tokens: Tensor, sorted_indices: Tensor, *args: Any, probs: Any = None,
               **kwargs: Any) -> Tensor:
    if probs is None and hasattr(sorted_indices, "rows"):
        return gather(permuted_tokens, sorted_indices)
    return original(permuted_tokens, sorted_indices, *args, probs=probs, **kwargs)


def _sort_chunks(original: Any, input: Tensor, split_sizes: Tensor, sorted_idxs: Tensor, probs: Any = None,
                 fused: bool = False) -> tuple:
    if not sorted_idxs.is_cuda and sorted_idxs.tolist() == list(range(len(sorted_idxs))):
        return input, probs  # on one expert-parallel rank the chunks lie in order
    return original(input, split_sizes, sorted_idxs, probs=probs, fused=fused)


def _without_atomics(replacements: Replacements) -> None:
    from megatron.core.transformer.moe import token_dispatcher

    for name, ours in {"permute": _permute, "unpermute": _unpermute, "sort_chunks_by_idxs": _sort_chunks}.items():
        replacements.wrap(token_dispatcher, name, ours)


FIX = Fix(
    name="permutation",
    symptom="on a GPU two runs of one seed differ, by the order of atomic additions of tokens; and tokens that are in "
            "order are copied to be sorted",
    cause="unpermute scatters with scatter_add_, the gradient of permute's index_select is an index_add_, and "
          "sort_chunks_by_idxs cuts and joins whatever the order is",
    versions="0.19.2",
    remove_when="permute and unpermute without transformer-engine are deterministic and as fast as gathers",
    needed=source_has("megatron.core.transformer.moe.moe_utils:unpermute", "output_tokens.scatter_add_("),
    apply=_without_atomics,
)
