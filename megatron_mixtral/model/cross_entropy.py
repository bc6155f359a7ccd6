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

from megatron_mixtral.runtime import gpu

# Logits of a chunk: enough for a large product.
CPU_CHUNK, GPU_CHUNK = 2**24, 2**27
# Numbers that stay in a CPU's caches while it passes over them several times.
CPU_BLOCK = 2**21


def _slices(tokens: int, numbers: int, vocabulary: int) -> list[slice]:
    """Rows of `vocabulary` logits each, at most `numbers` logits (or one row) a slice."""
    rows = max(numbers // vocabulary, 1)
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def _chunks(tokens: int, weight_vh: Tensor) -> list[slice]:
    """At least two where the logits of a chunk are fp32 (on a CPU those of bf16 stay bf16, see `CPU_BLOCK`)."""
    most = GPU_CHUNK if weight_vh.is_cuda else CPU_CHUNK
    if weight_vh.is_cuda or weight_vh.dtype == torch.float32:
        most = min(most, (tokens + 1) // 2 * len(weight_vh))
    return _slices(tokens, most, len(weight_vh))


def _own_targets(labels_t: Tensor, size: int, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """(column of each label among this rank's logits, whether it is this rank's); 0 where it is not."""
    column = labels_t - group.rank() * size
    own = (column >= 0) & (column < size)
    return column.masked_fill(~own, 0), own


def _over_ranks(total: Tensor, group: ProcessGroup) -> Tensor:
    """[rows]: logsumexp over the vocabulary of all ranks, of each rank's logsumexp over its own part."""
    if group.size() == 1:
        return total
    highest = total.clone()
    all_reduce(highest, ReduceOp.MAX, group=group)
    total = (total - highest).exp()
    all_reduce(total, group=group)
    return total.log_().add_(highest)


def _softmax_(logits: Tensor, group: ProcessGroup) -> Tensor:
    """[rows]: logsumexp over the vocabulary of all ranks; the fp32 `logits` become the probabilities."""
    highest = logits.amax(1)
    torch.softmax(logits, 1, out=logits)
    # The largest probability is exp(highest - logsumexp), 1/v or more: no second pass of exponentials is needed.
    own = highest - logits.amax(1).log()
    total = _over_ranks(own, group)
    if group.size() > 1:
        logits.mul_((own - total).exp()[:, None])
    return total


def _add_product(into_vh: Tensor | None, grad_tv: Tensor, hidden_th: Tensor, factor: float) -> Tensor:
    """`into_vh` + factor * grad^T hidden, in place, or a new fp32 tensor where there is none to add to."""
    if into_vh is None:
        product = (grad_tv.t() @ hidden_th).float()
        return product if factor == 1.0 else product.mul_(factor)
    if into_vh.is_cuda or into_vh.dtype == grad_tv.dtype:
        return gpu.add_product(into_vh, grad_tv, hidden_th, factor)
    # On a CPU a sum of two types first makes a copy in one type: of a part that the caches hold.
    rows = max(CPU_BLOCK // into_vh.shape[1], 1)
    for into, grad in zip(into_vh.split(rows), grad_tv.t().split(rows), strict=True):
        into.add_(grad @ hidden_th, alpha=factor)
    return into_vh


class _Gradients:
    """Gradients of hidden and weight, summed up chunk by chunk; those that are not wanted are None."""

    def __init__(self, hidden_th: Tensor, weight_vh: Tensor, wanted: tuple[bool, bool],
                 weight_into: Tensor | None = None) -> None:
        self._from, self._by, self._of_weight = hidden_th, weight_vh, wanted[1]
        self.hidden = torch.empty_like(hidden_th) if wanted[0] else None
        self.weight = weight_into

    def add(self, rows: slice, grad_tv: Tensor, factor: float = 1.0) -> None:
        """The two products of one chunk; `grad_tv` is the gradient of its logits, in the weight's dtype."""
        if self.hidden is not None:
            torch.mm(grad_tv, self._by, out=self.hidden[rows])
            if factor != 1.0:
                self.hidden[rows].mul_(factor)
        if self._of_weight:
            self.weight = _add_product(self.weight, grad_tv, self._from[rows], factor)


class _EarlyGradients:
    """The gradients as they are if the losses' gradient is `expected` [t], made with the losses.

    The last chunk, often the only one, waits with the gradient of its logits: when the true factor and the engine's
    gradient buffer are known, its products go there at once.
    """

    def __init__(self, hidden_th: Tensor, weight_vh: Tensor, wanted: tuple[bool, bool], expected_t: Tensor) -> None:
        self._found = _Gradients(hidden_th, weight_vh, wanted)
        self._scale = None if bool((expected_t == 1.0).all()) else expected_t
        self._waiting: tuple[slice, Tensor] | None = None

    def flush(self) -> None:
        """Make the products of the chunk that waits; its logits can be overwritten."""
        if self._waiting is not None:
            self._found.add(*self._waiting)
            self._waiting = None

    def put(self, rows: slice, logits: Tensor, column: Tensor, own: Tensor, group: ProcessGroup) -> tuple:
        """([rows] logsumexp, [rows] logit of each label, 0 where it is another rank's), both fp32. The logits, in the
        weight's dtype, become their gradient: (softmax - onehot) * expected.
        """
        total = torch.empty(len(logits), dtype=torch.float32)
        chosen = torch.empty_like(total)
        column, missing = column[rows, None], -own[rows, None].float()
        for part in _slices(len(logits), CPU_BLOCK, logits.shape[1]):
            grad = logits[part].float()
            chosen[part] = grad.gather(1, column[part])[:, 0]
            total[part] = _softmax_(grad, group)
            grad.scatter_add_(1, column[part], missing[part])
            if self._scale is not None:
                grad.mul_(self._scale[rows][part, None])
            if grad.dtype != logits.dtype:
                logits[part] = grad
        self._waiting = (rows, logits)
        return total, chosen

    def finish(self, factor: float, main_grad: Tensor | None) -> _Gradients:
        """The gradients, times `factor`; the weight's is added to `main_grad` where there is one."""
        waiting, found = self._waiting, self._found
        early = found.weight
        if found.hidden is not None:
            found.hidden.mul_(factor)
        if main_grad is not None:
            found.weight = main_grad if early is None else main_grad.add_(early, alpha=factor)
        elif early is not None:
            early.mul_(factor)
        if waiting is not None:
            found.add(*waiting, factor)
        return found


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
        wanted, early = ctx.needs_input_grad[:2], None
        if any(wanted) and not hidden_th.is_cuda:
            early = _EarlyGradients(hidden_th, weight_vh, wanted, expected_t)
        logits = None
        for rows in _chunks(len(labels_t), weight_vh):
            if early is None:
                logits = (hidden_th[rows] @ weight_vh.t()).float()
                chosen[rows] = logits.gather(1, column[rows, None])[:, 0]
                total[rows] = _over_ranks(logits.logsumexp(1), group)
            else:
                early.flush()
                logits = hidden_th.new_empty(rows.stop - rows.start, len(weight_vh)) if logits is None else logits
                logits = torch.mm(hidden_th[rows], weight_vh.t(), out=logits[:rows.stop - rows.start])
                total[rows], chosen[rows] = early.put(rows, logits, column, own, group)
        chosen.masked_fill_(~own, 0.0)
        if group.size() > 1:
            all_reduce(chosen, group=group)
        ctx.save_for_backward(hidden_th, labels_t, total, expected_t)
        ctx.weight, ctx.group, ctx.in_place, ctx.early = weight_vh, group, in_place, early
        return total - chosen

    @staticmethod
    def backward(ctx: Any, grad_t: Tensor) -> tuple[Tensor | None, ...]:
        hidden_th, labels_t, total, expected_t = ctx.saved_tensors
        weight, early, ctx.early = ctx.weight, ctx.early, None
        main_grad = getattr(weight, "main_grad", None) if ctx.in_place and ctx.needs_input_grad[1] else None
        factor = None if early is None else _factor(grad_t, expected_t)
        if factor is not None:
            found = early.finish(factor, main_grad)
        else:
            del early
            column, own = _own_targets(labels_t, weight.shape[0], ctx.group)
            found = _Gradients(hidden_th, weight, ctx.needs_input_grad[:2], main_grad)
            for rows in _chunks(len(labels_t), weight):
                grad = (hidden_th[rows] @ weight.t()).float().sub_(total[rows, None]).exp_()
                grad.scatter_add_(1, column[rows, None], -own[rows, None].float())
                found.add(rows, grad.mul_(grad_t[rows, None]).to(weight.dtype))
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
