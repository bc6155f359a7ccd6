"""SwiGLU times the router's probability on a CPU, in as few passes over memory as torch's own kernels allow.

The engine's function (`weighted_bias_swiglu_impl`) is made for torch.compile, which fuses it on a GPU; run as written
it takes about twenty passes over tensors larger than a CPU's caches. The probability is rounded to the dtype of the
tensors, as transformers rounds it: on a CPU a product of two types copies the larger tensor twice.
"""

from typing import Any

import torch
from torch import Tensor


def weighted_swiglu(x_t2f: Tensor, probability_t1: Tensor) -> Tensor:
    """silu(gate) * up * probability, without a gradient."""
    gate, up = x_t2f.chunk(2, -1)
    return torch.nn.functional.silu(gate).mul_(up).mul_(probability_t1.to(x_t2f.dtype))


class WeightedSwiGLU(torch.autograd.Function):
    """silu(gate) * up * probability of [t, 2 f] (gate, then up) and [t, 1] -> [t, f] in the dtype of the first."""

    @staticmethod
    def forward(ctx: Any, x_t2f: Tensor, probability_t1: Tensor) -> Tensor:
        ctx.save_for_backward(x_t2f, probability_t1)
        return weighted_swiglu(x_t2f, probability_t1)

    @staticmethod
    def backward(ctx: Any, grad_tf: Tensor) -> tuple[Tensor, Tensor]:
        x_t2f, probability_t1 = ctx.saved_tensors
        gate, up = x_t2f.chunk(2, -1)
        rounded_t1 = probability_t1.to(x_t2f.dtype)
        grad_x = torch.empty_like(x_t2f)
        grad_gate, grad_up = grad_x.chunk(2, -1)
        part = torch.nn.functional.silu(gate).mul_(grad_tf)
        torch.mul(part, rounded_t1, out=grad_up)
        grad_probability = part.mul_(up).sum(-1, keepdim=True, dtype=probability_t1.dtype)
        torch.mul(grad_tf, up, out=part)
        torch.ops.aten.silu_backward.grad_input(part.mul_(rounded_t1), gate, grad_input=grad_gate)
        return grad_x, grad_probability
