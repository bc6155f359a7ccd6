"""A step whose gradient is not finite is skipped: the repair of the engine's threshold, which lets NaN through.

`training/pretrain.py` sets the engine's `grad_norm_skip_threshold` to the largest float, so that an infinite norm
skips the step; with this repair a norm that is no number counts as infinite.
"""

import math
from typing import Any

from megatron_mixtral.runtime.replacements import Fix, around, source_has


def _nan_as_infinite(get_grad_norm: Any, optimizer: Any) -> Any:
    norm = get_grad_norm(optimizer)
    return math.inf if norm is not None and math.isnan(norm) else norm


FIX = Fix(
    name="nan-norm",
    symptom="a gradient with NaN is applied, whatever grad_norm_skip_threshold says, and every weight is lost",
    cause="the norm is compared by `norm > threshold`, which is false for NaN",
    versions="0.19.2",
    remove_when="ChainedOptimizer.step skips a norm that is not finite",
    needed=source_has("megatron.core.optimizer.optimizer:ChainedOptimizer.step",
                      "grad_norm > grad_norm_skip_threshold"),
    apply=around("megatron.core.optimizer.optimizer:ChainedOptimizer.get_grad_norm", _nan_as_infinite),
)
