"""A step whose gradient is not finite is skipped: the repair of the engine's threshold, which lets NaN through.

`training/pretrain.py` sets the engine's `grad_norm_skip_threshold` to the largest float, so that an infinite norm
skips the step; with this repair a norm that is no number counts as infinite.
"""

import functools
import inspect
import math
from typing import Any

from megatron_mixtral.runtime.replacements import Fix, Replacements


def nan_passes_the_threshold() -> bool:
    """Whether the engine compares a norm with its threshold in a way that is false for NaN."""
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    return "grad_norm > grad_norm_skip_threshold" in inspect.getsource(ChainedOptimizer.step)


def count_nan_as_infinite(replacements: Replacements) -> None:
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    original = ChainedOptimizer.get_grad_norm

    @functools.wraps(original)
    def get_grad_norm(self: Any) -> Any:
        norm = original(self)
        return math.inf if norm is not None and math.isnan(norm) else norm

    replacements.set(ChainedOptimizer, "get_grad_norm", get_grad_norm)


FIX = Fix(
    name="nan-norm",
    symptom="a gradient with NaN is applied, whatever grad_norm_skip_threshold says, and every weight is lost",
    cause="the norm is compared by `norm > threshold`, which is false for NaN",
    versions="0.19.2",
    remove_when="ChainedOptimizer.step skips a norm that is not finite",
    needed=nan_passes_the_threshold,
    apply=count_nan_as_infinite,
)
