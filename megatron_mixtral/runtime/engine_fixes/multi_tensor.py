"""Norm and scaling of many gradients at once, in the calling form of apex's multi-tensor kernels.

The engine's own stand-ins read every tensor's norm back to the host and scale through a copy of every gradient; these
stay on the device and in place. `engine_fixes` puts them where transformer-engine and apex are absent.
"""

from typing import Any

import torch
from torch import Tensor


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
