"""The word embedding on a CPU: its gradient goes into the engine's gradient buffer, row by row of the tokens that were.

Autograd makes a gradient of the whole vocabulary, nearly all of it zeros, which the engine then adds to its buffer:
three passes over the weight for a few hundred rows. `model/builder.py` puts `WordEmbedding` into the engine's model.

Shape suffixes: b batch, s sequence, h hidden, v vocabulary of this tensor-parallel rank.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor


class _Rows(torch.autograd.Function):
    """[b, s, h]: the weight's rows of `ids_bs`, zeros where `elsewhere_bs`. The gradient is added to `main_grad`."""

    @staticmethod
    def forward(ctx: Any, weight_vh: Tensor, ids_bs: Tensor, elsewhere_bs: Tensor | None) -> Tensor:
        ctx.weight, ctx.ids, ctx.elsewhere = weight_vh, ids_bs, elsewhere_bs
        rows = weight_vh.index_select(0, ids_bs.flatten()).view(*ids_bs.shape, -1)
        return rows if elsewhere_bs is None else rows.masked_fill_(elsewhere_bs[..., None], 0.0)

    @staticmethod
    def backward(ctx: Any, grad_bsh: Tensor) -> tuple[Tensor, None, None]:
        into = ctx.weight.main_grad
        grad = grad_bsh.to(into.dtype)
        if ctx.elsewhere is not None:
            grad = grad.masked_fill(ctx.elsewhere[..., None], 0.0)
        into.index_add_(0, ctx.ids.flatten(), grad.flatten(0, 1))
        ctx.weight.grad_added_to_main_grad = True  # see model/experts.py
        return ctx.weight.detach(), None, None


class WordEmbedding(VocabParallelEmbedding):
    """The engine's, made one by its class alone: weight, state dict and shards are the engine's."""

    shared = False  # with the output layer: then autograd adds two gradients, and neither may be in the buffer already

    @classmethod
    def take_over(cls, embedding: VocabParallelEmbedding, shared: bool) -> None:
        """Give an embedding of the engine's model, which has no place to name another, the forward of this class."""
        embedding.__class__ = cls
        embedding.shared = shared

    def forward(self, input_: Tensor) -> Tensor:
        """[b, s] -> [b, s, h], or [s, b, h] cut along s under sequence parallelism, as the engine's."""
        weight = self.weight
        if (weight.is_cuda or self.shared or self.gtp_remat_size > 1 or not torch.is_grad_enabled()
                or not weight.requires_grad or not hasattr(weight, "main_grad")
                or not hasattr(weight, "grad_added_to_main_grad")):
            return super().forward(input_)
        if self.tp_group.size() == 1:
            return _Rows.apply(weight, input_, None)
        elsewhere = (input_ < self.vocab_start_index) | (input_ >= self.vocab_end_index)
        rows = _Rows.apply(weight, (input_ - self.vocab_start_index).masked_fill(elsewhere, 0), elsewhere)
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(rows.transpose(0, 1).contiguous(), group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)
