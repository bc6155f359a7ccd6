"""Matrix products: into an fp32 gradient buffer in one pass, and of groups of rows by the way this GPU is faster at.

What torch's kernels do differs by version and by GPU, and is no matter of documentation: it is tried once in a process.

Shape suffixes: t rows, o and i the two sides of a weight [o, i].
"""

import functools
import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from megatron_mixtral.runtime.replacements import Fix, Replacements

logger = logging.getLogger(__name__)

_HALF = (torch.bfloat16, torch.float16)
_ROUNDS = 3  # of which the fastest counts
_chosen: dict[Hashable, int] = {}


def add_product(into_oi: Tensor, grad_to: Tensor, x_ti: Tensor, factor: float = 1.0) -> Tensor:
    """`into` + factor * grad^T x, in place. Operands of 16 bits go into an fp32 buffer unrounded and in one pass, where
    torch can do that; else their product is rounded to 16 bits and added.
    """
    if into_oi.dtype == x_ti.dtype:
        return into_oi.addmm_(grad_to.t(), x_ti, alpha=factor)
    if into_oi.dtype == torch.float32 and x_ti.dtype in _HALF and adds_into_fp32():
        return _addmm_into(into_oi, grad_to.t(), x_ti, factor)
    return into_oi.add_(grad_to.t() @ x_ti, alpha=factor)


def _addmm_into(into: Tensor, a: Tensor, b: Tensor, factor: float) -> Tensor:
    return torch.addmm(into, a, b, alpha=factor, out_dtype=torch.float32, out=into)


@functools.cache
def adds_into_fp32() -> bool:
    """Whether this torch and this GPU add a product of 16-bit types to an fp32 tensor in place. Asked once."""
    a, b = (torch.ones(16, 16, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    # 1 + 2**-12 is no bf16: a product that is rounded, or a sum that is forgotten, shows.
    into = torch.full((16, 16), 2.0**-12, device="cuda")
    try:
        _addmm_into(into, a, b, 0.0625)
    except (RuntimeError, TypeError, NotImplementedError) as refusal:
        logger.info("weight gradients take a pass of their own: torch %s refuses products into fp32 (%s)",
                    torch.__version__, str(refusal).partition("\n")[0])
        return False
    return bool((into == 1 + 2.0**-12).all())


# -- groups ---------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)  # the layers of the micro-batches on their way
def group_ends(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """[groups] int32 on the device: where each group of rows ends. The host does not wait for the copy."""
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    return ends.pin_memory().to(device, non_blocking=True) if device.type != "cpu" else ends


def groups_are_fast(dtype: torch.dtype) -> bool:
    """Whether `grouped_mm` has a kernel of its own here. Elsewhere torch takes a loop, and waits for the counts."""
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] in (9, 10)


def has_flash(query: Tensor) -> bool:
    """Whether torch's variable-length attention, which is flash attention, takes such queries."""
    return query.is_cuda and query.dtype in _HALF and torch.cuda.get_device_capability() >= (8, 0)


def fastest(key: Hashable, *ways: Callable[[], Tensor]) -> Tensor:
    """What `ways` all give, by the one that took the least time when `key` first came."""
    if key not in _chosen:
        taken = [_milliseconds(way) for way in ways]
        _chosen[key] = taken.index(min(taken))
        logger.debug("%s: way %d of %s ms", key, _chosen[key], taken)
    return ways[_chosen[key]]()


def _milliseconds(way: Callable[[], Tensor]) -> float:
    """Of the GPU, the least of a few, after one that does not count."""
    way()
    taken = []
    for _ in range(_ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        way()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return min(taken)


# -- the engine's linears -------------------------------------------------------------------------------


class WeightGradients:
    """In the place of apex's `fused_weight_gradient_mlp_cuda`, by whose names the engine's linears call it."""

    @staticmethod
    def wgrad_gemm_accum_fp32(x_ti: Tensor, grad_to: Tensor, main_grad_oi: Tensor) -> None:
        add_product(main_grad_oi, grad_to, x_ti)

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def _lacks_apex() -> bool:
    from megatron.core.tensor_parallel import layers

    return not layers._grad_accum_fusion_available


def _stand_in_for_apex(replacements: Replacements) -> None:
    from megatron.core.tensor_parallel import layers

    vars(layers).setdefault("fused_weight_gradient_mlp_cuda", None)  # the failed import left no name
    replacements.set(layers, "fused_weight_gradient_mlp_cuda", WeightGradients)
    replacements.set(layers, "_grad_accum_fusion_available", True)


FIX = Fix(
    name="weight-gradients",
    symptom="with transformer-engine and without apex no model is built: 'ColumnParallelLinear was called with "
            "gradient_accumulation_fusion' (NVIDIA/Megatron-LM#1885); without either, a pass over all weights a step",
    cause="the engine's own linears, of which the output layer is always one, ask for apex's extension, whatever "
          "transformer-engine's linears do by themselves",
    versions="0.19.2",
    remove_when="ColumnParallelLinear adds gradients to main_grad without apex",
    needed=_lacks_apex,
    apply=_stand_in_for_apex,
)
