"""Output layer and cross entropy in one, a chunk of tokens at a time: logits of the whole vocabulary never stand whole.

`MixtralModel` calls it wherever labels are given. The backward pass computes each chunk's logits again: one product
more of the output layer (0.3 % of Mixtral-8x7B's step) for logits in fp32, 32,000 numbers a token, and their gradient.

Shape suffixes: t tokens, v vocabulary of this tensor-parallel rank, h hidden, s sequence, b batch.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

# Logits of a chunk: on a CPU what its caches hold, on a GPU enough for a large product.
CPU_CHUNK, GPU_CHUNK = 2**23, 2**25


def _chunks(tokens: int, weight_vh: Tensor) -> list[slice]:
    rows = max((GPU_CHUNK if weight_vh.is_cuda else CPU_CHUNK) // weight_vh.shape[0], 1)
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def _own_targets(labels_t: Tensor, size: int, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """(column of each label among this rank's logits, whether it is this rank's); 0 where it is not."""
    column = labels_t - group.rank() * size
    own = (column >= 0) & (column < size)
    return column.masked_fill(~own, 0), own


class _ChunkedLoss(torch.autograd.Function):
    """Cross entropy [t] fp32 of labels [t] under logits = hidden [t, h] weight [v, h]^T, the vocabulary cut over ranks.

    -log softmax(logits)[label] = logsumexp(logits) - logits[label]; its gradient is softmax(logits) - onehot(label).
    """

    @staticmethod
    def forward(ctx: Any, hidden_th: Tensor, weight_vh: Tensor, labels_t: Tensor, group: ProcessGroup,
                in_place: bool) -> Tensor:
        column, own = _own_targets(labels_t, weight_vh.shape[0], group)
        total = torch.empty(labels_t.shape, dtype=torch.float32, device=hidden_th.device)  # logsumexp
        chosen = torch.empty_like(total)
        for rows in _chunks(len(labels_t), weight_vh):
            logits = (hidden_th[rows] @ weight_vh.t()).float()
            chosen[rows] = logits.gather(1, column[rows, None])[:, 0]
            total[rows] = logits.logsumexp(1)
        chosen.masked_fill_(~own, 0.0)
        if group.size() > 1:
            highest = total.clone()
            all_reduce(highest, ReduceOp.MAX, group=group)
            parts = torch.stack(((total - highest).exp(), chosen))
            all_reduce(parts, group=group)
            total, chosen = highest + parts[0].log(), parts[1]
        ctx.save_for_backward(hidden_th, labels_t, total)
        ctx.weight, ctx.group, ctx.in_place = weight_vh, group, in_place
        return total - chosen

    @staticmethod
    def backward(ctx: Any, grad_t: Tensor) -> tuple[Tensor | None, ...]:
        hidden_th, labels_t, total = ctx.saved_tensors
        weight = ctx.weight
        column, own = _own_targets(labels_t, weight.shape[0], ctx.group)
        grad_hidden = torch.empty_like(hidden_th) if ctx.needs_input_grad[0] else None
        main_grad = getattr(weight, "main_grad", None) if ctx.in_place else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if main_grad is None else main_grad
        for rows in _chunks(len(labels_t), weight):
            logits = (hidden_th[rows] @ weight.t()).float()
            grad = logits.sub_(total[rows, None]).exp_()
            grad.scatter_add_(1, column[rows, None], -own[rows, None].float())
            grad = grad.mul_(grad_t[rows, None]).to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None and grad_weight.dtype == grad.dtype:
                grad_weight.addmm_(grad.t(), hidden_th[rows])
            elif grad_weight is not None:
                grad_weight.add_(grad.t() @ hidden_th[rows])
        if main_grad is not None and grad_weight is not None:
            weight.grad_added_to_main_grad = True  # see model/experts.py
            return grad_hidden, weight.detach(), None, None, None
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def chunked_loss(*, hidden_states: Tensor, output_layer: torch.nn.Module, output_weight: Tensor | None,
                 labels: Tensor, config: Any, **kwargs: Any) -> Tensor:
    """Token losses [b, s] in nats, fp32, from the last layer's output [s, b, h] (a slice of s under sequence
    parallelism). The engine's `output_processor` of a GPTModel; `output_weight` is the embedding's where it is shared.
    """
    # The module itself is not called: what waits for its parameters (overlapped gathering) must still run.
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, None)
    group = output_layer.tp_group
    if config.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
    else:
        hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)
    weight = output_layer.weight if output_weight is None else output_weight
    labels_sb = labels.transpose(0, 1)
    # A shared weight has another gradient, of the embedding: autograd adds the two.
    losses = _ChunkedLoss.apply(hidden_states.flatten(0, 1), weight, labels_sb.reshape(-1), group,
                                output_weight is None and hasattr(weight, "grad_added_to_main_grad"))
    return losses.view(labels_sb.shape).transpose(0, 1).contiguous()
