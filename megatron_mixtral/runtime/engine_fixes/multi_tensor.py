"""Norm and scaling of many gradients at once, in the calling form of apex's multi-tensor kernels.

The engine's own stand-ins read every tensor's norm back to the host and scale through a copy of every gradient; these
stay on the device and in place.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_mixtral.runtime.replacements import Fix, Replacements

BLOCK = 1 << 14  # elements whose squares are added in fp32: a relative error below 2e-7


def l2_norm(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool,
            *args: Any) -> tuple[Tensor, None]:
    """([1] fp32: the norm of all tensors as one vector, None)."""
    flat = [tensor for tensors in tensor_lists for tensor in tensors]
    if flat and not flat[0].is_cuda:
        return _norm_on_cpu(flat), None
    return torch.nn.utils.get_total_norm(flat).float().reshape(1), None


def _norm_on_cpu(tensors: list[Tensor]) -> Tensor:
    """torch's norms of fp32 on a CPU add squares one by one in fp32: with 33 M elements they are 2e-3 too small. Here
    only blocks are added so, which BLAS does in as much time, and the blocks' sums in fp64.
    """
    blocks = (block.float() for tensor in tensors for block in tensor.flatten().split(BLOCK))
    return torch.stack([torch.dot(block, block) for block in blocks]).double().sum().sqrt().float().reshape(1)


def scale(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], factor: float) -> None:
    """`tensor_lists` is [sources, targets]: targets = sources * factor; in place where they are the same tensors."""
    sources, targets = tensor_lists
    if sources is not targets:
        torch._foreach_copy_(targets, sources)
    if factor != 1.0:
        torch._foreach_mul_(targets, factor)


def _engine_scales_through_copies() -> bool:
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    return clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale


def _scale_in_place(replacements: Replacements) -> None:
    from megatron.core.optimizer import clip_grads

    replacements.set(clip_grads, "multi_tensor_scale_impl", scale)
    replacements.set(clip_grads, "l2_norm_impl", l2_norm)


FIX = Fix(
    name="gradient-clipping",
    symptom="clipping waits for the device once a parameter and makes a copy of every gradient",
    cause="the engine's stand-ins for apex's multi-tensor kernels take norms with float() and scale with copy_",
    versions="0.19.2",
    remove_when="local_multi_tensor_scale and local_multi_tensor_l2_norm work in place and on the device",
    needed=_engine_scales_through_copies,
    apply=_scale_in_place,
)


def _engine_adds_fp32_naively() -> bool:
    from megatron.core import utils
    from megatron.training.utils import common_utils

    return common_utils.multi_tensor_l2norm is utils.local_multi_tensor_l2_norm


def _norm_of_parameters(replacements: Replacements) -> None:
    from megatron.training.utils import common_utils

    replacements.set(common_utils, "multi_tensor_l2norm", l2_norm)


TRAINING_FIX = Fix(
    name="params-norm",
    symptom="--log-params-norm on a CPU is too small, by 2e-3 for a tensor of 33 M elements",
    cause="the engine's stand-in for apex's kernel takes torch.norm, which adds fp32 squares one by one on a CPU",
    versions="0.19.2",
    remove_when="local_multi_tensor_l2_norm, or torch.norm on a CPU, adds in fp64 or in blocks",
    needed=_engine_adds_fp32_naively,
    apply=_norm_of_parameters,
)
