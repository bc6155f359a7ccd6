"""RMSNorm in plain torch that works with sequence parallelism, which the engine's torch wrapper refuses."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich, 2019), statistics in fp32.

    Under sequence parallelism each tensor-parallel rank norms its own slice of the sequence, so the weight's gradient
    is a partial sum; the attribute `sequence_parallel` makes the engine all-reduce it over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        if x.is_cuda:
            return torch.nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """The same on a CPU, where torch makes norm and gradient of twenty small operations, each a pass over memory.

    With n = x / rms(x) and d = gradient * weight, the gradient of x is (d - n mean(d n)) / rms(x), that of the weight
    the sum of gradient * n over all positions.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_h: Tensor, eps: float) -> Tensor:
        wide = x.float()
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_h, scale)
        return (wide * scale).mul_(weight_h.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_h, scale = ctx.saved_tensors
        normed, grad = x.float() * scale, grad.float()
        part = grad * normed
        grad_weight = part.flatten(0, -2).sum(0).to(weight_h.dtype)
        shared = part.mul_(weight_h.float()).mean(-1, keepdim=True)
        grad_x = (grad * weight_h.float()).addcmul_(normed, shared, value=-1.0).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None
