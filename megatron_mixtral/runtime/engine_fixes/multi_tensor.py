"""Norm and scaling of many gradients at once, in the calling form of apex's multi-tensor kernels.

The engine's own stand-ins read every tensor's norm back to the host and scale through a copy of every gradient; these
stay on the device and in place.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_mixtral.runtime.replacements import Fix, Replacements


def l2_norm(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool,
            *args: Any) -> tuple[Tensor, None]:
    """([1] fp32: the norm of all tensors as one vector, None)."""
    total = torch.nn.utils.get_total_norm([tensor for tensors in tensor_lists for tensor in tensors])
    return total.float().reshape(1), None


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
