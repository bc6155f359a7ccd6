"""Output layer and cross entropy in one, a chunk of tokens at a time: logits of the whole vocabulary never stand whole.

`MixtralModel` calls it wherever labels are given. On a GPU the backward pass computes each chunk's logits again: one
product more of the output layer (0.3 % of Mixtral-8x7B's step) instead of 32,000 numbers a token and their gradient.

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


def _log_total(logits: Tensor, group: ProcessGroup) -> Tensor:
    """[rows]: logsumexp over the vocabulary of all ranks."""
    total = logits.logsumexp(1)
    if group.size() > 1:
        highest = total.clone()
        all_reduce(highest, ReduceOp.MAX, group=group)
        total = (total - highest).exp()
        all_reduce(total, group=group)
        total = total.log_().add_(highest)
    return total


class _Gradients:
    """Gradients of hidden and weight, summed up chunk by chunk; those that are not wanted are None."""

    def __init__(self, hidden_th: Tensor, weight_vh: Tensor, wanted: tuple[bool, bool],
                 weight_into: Tensor | None = None) -> None:
        self.hidden = torch.empty_like(hidden_th) if wanted[0] else None
        self.weight = None
        if wanted[1]:
            self.weight = torch.zeros_like(weight_vh, dtype=torch.float32) if weight_into is None else weight_into

    def add(self, rows: slice, logits: Tensor, total: Tensor, column: Tensor, own: Tensor, scale: Tensor,
            hidden_th: Tensor, weight_vh: Tensor) -> None:
        """One chunk, whose logits are overwritten: (softmax - onehot) * scale, and its two products."""
        grad = logits.sub_(total[:, None]).exp_()
        grad.scatter_add_(1, column[rows, None], -own[rows, None].float())
        grad = grad.mul_(scale[rows, None]).to(weight_vh.dtype)
        if self.hidden is not None:
            torch.mm(grad, weight_vh, out=self.hidden[rows])
        if self.weight is not None and self.weight.dtype == grad.dtype:
            self.weight.addmm_(grad.t(), hidden_th[rows])
        elif self.weight is not None:
            self.weight.add_(grad.t() @ hidden_th[rows])


class _ChunkedLoss(torch.autograd.Function):
    """Cross entropy [t] fp32 of labels [t] under logits = hidden [t, h] weight [v, h]^T, the vocabulary cut over ranks.

    -log softmax(logits)[label] = logsumexp(logits) - logits[label]; its gradient is softmax(logits) - onehot(label).

    On a CPU, where the product is dear, the gradients are made with the loss as if the incoming gradient were
    `expected` [t]; the backward pass multiplies by the one factor between the two. If there is none, or on a GPU, where
    looking would mean waiting, it computes each chunk's logits again.
    """

    @staticmethod
    def forward(ctx: Any, hidden_th: Tensor, weight_vh: Tensor, labels_t: Tensor, expected_t: Tensor,
                group: ProcessGroup, in_place: bool) -> Tensor:
        column, own = _own_targets(labels_t, weight_vh.shape[0], group)
        total = torch.empty(labels_t.shape, dtype=torch.float32, device=hidden_th.device)  # logsumexp
        chosen = torch.empty_like(total)
        early = any(ctx.needs_input_grad[:2]) and not hidden_th.is_cuda
        ctx.early = _Gradients(hidden_th, weight_vh, ctx.needs_input_grad[:2]) if early else None
        for rows in _chunks(len(labels_t), weight_vh):
            logits = (hidden_th[rows] @ weight_vh.t()).float()
            chosen[rows] = logits.gather(1, column[rows, None])[:, 0]
            total[rows] = _log_total(logits, group)
            if ctx.early is not None:
                ctx.early.add(rows, logits, total[rows], column, own, expected_t, hidden_th, weight_vh)
        chosen.masked_fill_(~own, 0.0)
        if group.size() > 1:
            all_reduce(chosen, group=group)
        ctx.save_for_backward(hidden_th, labels_t, total, expected_t)
        ctx.weight, ctx.group, ctx.in_place = weight_vh, group, in_place
        return total - chosen

    @staticmethod
    def backward(ctx: Any, grad_t: Tensor) -> tuple[Tensor | None, ...]:
        hidden_th, labels_t, total, expected_t = ctx.saved_tensors
        weight, early, ctx.early = ctx.weight, ctx.early, None
        main_grad = getattr(weight, "main_grad", None) if ctx.in_place and ctx.needs_input_grad[1] else None
        factor = None if early is None else _factor(grad_t, expected_t)
        if factor is not None:
            found = early
            if found.hidden is not None:
                found.hidden.mul_(factor)
            if main_grad is not None:
                main_grad.add_(found.weight, alpha=factor)
            elif found.weight is not None:
                found.weight.mul_(factor)
        else:
            column, own = _own_targets(labels_t, weight.shape[0], ctx.group)
            found = _Gradients(hidden_th, weight, ctx.needs_input_grad[:2], main_grad)
            for rows in _chunks(len(labels_t), weight):
                logits = (hidden_th[rows] @ weight.t()).float()
                found.add(rows, logits, total[rows], column, own, grad_t, hidden_th, weight)
        if main_grad is not None:
            weight.grad_added_to_main_grad = True  # see model/experts.py
            return found.hidden, weight.detach(), None, None, None, None
        return found.hidden, None if found.weight is None else found.weight.to(weight.dtype), None, None, None, None


def _factor(grad_t: Tensor, expected_t: Tensor) -> float | None:
    """f with grad = f * expected, or None."""
    at = expected_t.abs().argmax()
    largest = float(expected_t[at])
    factor = float(grad_t[at]) / largest if largest else 0.0
    off = float((grad_t - factor * expected_t).abs().max()) if len(grad_t) else 0.0
    return factor if off <= 1e-7 * abs(factor) * abs(largest) else None


def chunked_loss(*, hidden_states: Tensor, output_layer: torch.nn.Module, output_weight: Tensor | None,
                 labels: Tensor, loss_mask: Tensor | None, config: Any, **kwargs: Any) -> Tensor:
    """Token losses [b, s] in nats, fp32, from the last layer's output [s, b, h] (a slice of s under sequence
    parallelism). The engine's `output_processor` of a GPTModel; `output_weight` is the embedding's where it is shared.
    `loss_mask` [b, s] only says which gradient to expect; the losses do not depend on it.
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
    expected = torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask.float()
    # A shared weight has another gradient, of the embedding: autograd adds the two.
    losses = _ChunkedLoss.apply(hidden_states.flatten(0, 1), weight, labels_sb.reshape(-1),
                                expected.view(labels.shape).t().reshape(-1), group,
                                output_weight is None and hasattr(weight, "grad_added_to_main_grad"))
    return losses.view(labels_sb.shape).transpose(0, 1).contiguous()
