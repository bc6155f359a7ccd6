"""The frozen base in 4 bits: packed while it is read, made dense for one product at a time, never kept dense.

NF4 as in `weights.adapters.nf4`. The largest magnitudes stay in the weights' own type, in which they are exact:
0.53125 bytes a parameter of a bf16 model. On a GPU bitsandbytes' kernels do the same where they can be imported.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_mixtral.errors import ConfigError
from megatron_mixtral.model import experts
from megatron_mixtral.weights.adapters import nf4 as table

# Numbers packed or unpacked at a time, which decide what is needed besides the result: as many as a core's cache holds,
# or enough for a kernel.
STEPS = {"cpu": 1 << 16, "cuda": 1 << 22}


@functools.cache
def _kernels() -> Any:
    """bitsandbytes' functions; None where it is not installed."""
    try:
        from bitsandbytes import functional
    except ImportError:
        return None
    return functional


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """[256, 2] float32: the two values of each byte."""
    values = torch.from_numpy(table.VALUES).to(device)
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)


def pack(dense: Tensor) -> tuple[Tensor, Tensor]:
    """[..., i] -> uint8 [..., i / 2] and the blocks' largest magnitudes [..., i / 64], of the dense type."""
    if dense.is_cuda and _kernels() is not None:
        packed, state = _kernels().quantize_4bit(dense.contiguous(), blocksize=table.BLOCK, quant_type="nf4",
                                                 compress_statistics=False)
        return packed.view(*dense.shape[:-1], -1), state.absmax.view(*dense.shape[:-1], -1).to(dense.dtype)
    bounds = torch.from_numpy(table.BOUNDS).to(dense.device)
    packed, absmax = [], []
    for part in dense.reshape(-1, table.BLOCK).split(STEPS[dense.device.type] // table.BLOCK):
        part = part.float()
        largest = part.abs().amax(dim=1)
        codes = torch.bucketize(part / largest.clamp_min(float(table.TINY))[:, None], bounds, out_int32=True)
        codes = codes.to(torch.uint8).view(-1, 2)
        packed.append(codes[:, 0] << 4 | codes[:, 1])
        absmax.append(largest)
    return torch.cat(packed).view(*dense.shape[:-1], -1), torch.cat(absmax).view(*dense.shape[:-1], -1).to(dense.dtype)


def unpack(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack`, rounded to `dtype`: [..., i]."""
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    if packed.is_cuda and _kernels() is not None:
        state = _kernels().QuantState(absmax=absmax.flatten().float(), shape=torch.Size(shape), dtype=dtype,
                                      blocksize=table.BLOCK, quant_type="nf4",
                                      code=_kernels().get_4bit_type("nf4", packed.device))
        return _kernels().dequantize_4bit(packed.reshape(-1, 1), state).view(shape)
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    step = STEPS[packed.device.type] // table.BLOCK
    rows, parts = out.view(-1, table.BLOCK).split(step), packed.reshape(-1, table.BLOCK // 2).split(step)
    for into, part, largest in zip(rows, parts, absmax.flatten().split(step), strict=True):
        values = torch.nn.functional.embedding(part.int(), _pairs(packed.device)).flatten(1)
        into.copy_(values.mul_(largest.float()[:, None]))
    return out


class Packed(torch.nn.Module):
    """A frozen weight [o, i], or a stack of them [e, o, i], in 4 bits. It stands where a linear has its parameter."""

    requires_grad = False  # what the engine's linears ask of a weight

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: Any) -> None:
        """Raises `ConfigError` where a row is cut into shares that are no whole blocks."""
        super().__init__()
        if shape[-1] % table.BLOCK:
            raise ConfigError(f"--qlora packs blocks of {table.BLOCK} numbers along a matrix' rows, and a rank's share "
                              f"of a row has {shape[-1]}: choose tensor parallel sizes that leave a multiple of "
                              f"{table.BLOCK}")
        self.shape, self.dtype = torch.Size(shape), dtype
        self.register_buffer("nf4", torch.empty(*shape[:-1], shape[-1] // 2, dtype=torch.uint8, device=device),
                             persistent=False)
        self.register_buffer("absmax", torch.empty(*shape[:-1], shape[-1] // table.BLOCK, dtype=dtype, device=device),
                             persistent=False)

    def copy_(self, dense: Tensor) -> None:
        """Pack a weight of this shape."""
        self.nf4, self.absmax = (one.to(self.nf4.device) for one in pack(dense))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight, as far as 4 bits tell it; made anew in each call."""
        return unpack(self.nf4, self.absmax, dtype)


class Slot:
    """The weight [o, i] of one expert in a packed stack, to be filled."""

    def __init__(self, packed: Packed, index: int) -> None:
        self._packed, self._index = packed, index
        self.shape, self.dtype = packed.shape[1:], packed.dtype

    def copy_(self, dense: Tensor) -> None:
        for into, part in zip((self._packed.nf4, self._packed.absmax), pack(dense), strict=True):
            into[self._index].copy_(part)


class _Linear(torch.autograd.Function):
    """y = x W^T of a packed W. What the engine's `LinearWithFrozenWeight` computes, which would keep W dense."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed, group: Any) -> Tensor:
        ctx.packed, ctx.group = packed, group
        return x.matmul(packed.dense(x.dtype).t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad_x = grad.matmul(ctx.packed.dense(grad.dtype))
        if ctx.group is not None:
            torch.distributed.all_reduce(grad_x, group=ctx.group)
        return grad_x, None, None


def packed_linear(x: Tensor, packed: Packed, *, sequence_parallel: bool, allreduce_dgrad: bool,
                  tp_group: Any) -> Tensor:
    """What a tensor-parallel linear of the engine computes of its input, with the same communication."""
    if sequence_parallel:
        x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=tp_group)
    return _Linear.apply(x, packed, tp_group if allreduce_dgrad else None)


class _Grouped(torch.autograd.Function):
    """The rows of each group times the group's packed weight."""

    @staticmethod
    def forward(ctx: Any, x_ti: Tensor, counts: list[int], packed: Packed) -> Tensor:
        ctx.counts, ctx.packed = counts, packed
        return experts.products(x_ti.contiguous(), counts, packed.dense(x_ti.dtype).unbind(), transpose=True)

    @staticmethod
    def backward(ctx: Any, grad_to: Tensor) -> tuple[Tensor, None, None]:
        dense = ctx.packed.dense(grad_to.dtype).unbind()
        return experts.products(grad_to.contiguous(), ctx.counts, dense, transpose=False), None, None


def packed_experts(x_ti: Tensor, counts: list[int], packed: Packed) -> Tensor:
    """[t, o]: the tokens of each expert times its packed weight."""
    return _Grouped.apply(x_ti, counts, packed)
