"""Recomputing a part whose output is discarded (`--recompute-modules moe_act layernorm`) without transformer-engine.

The engine's `CheckpointWithoutOutput` asks transformer-engine whether FP8 is on, also where nobody wants FP8, and gives
the recomputed bytes to the discarded tensor by a C++ extension that every rank compiles at its first step.
"""

import inspect
from typing import Any

import torch

from megatron_mixtral.runtime.replacements import Fix, Replacements


def fp8_is_assumed() -> bool:
    """Whether the engine takes FP8's default, False, for a wish, and there is no transformer-engine to ask."""
    from megatron.core.tensor_parallel import random

    return not random.HAVE_TE and "self.fp8 = fp8 is not None" in inspect.getsource(random.CheckpointWithoutOutput)


def do_without(replacements: Replacements) -> None:
    from megatron.core.tensor_parallel import random

    replacements.wrap(random.CheckpointWithoutOutput, "__init__", _without_fp8)
    replacements.set(random, "_get_share_storage", lambda: _refill)


def _without_fp8(init: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> None:
    init(checkpoint, *args, **kwargs)
    checkpoint.fp8 = False


def _refill(discarded: torch.Tensor, recomputed: torch.Tensor) -> None:
    """Give a tensor whose storage was released the bytes of another, below autograd: no version is counted."""
    source, storage = recomputed.untyped_storage(), discarded.untyped_storage()
    storage.resize_(source.nbytes())
    storage.copy_(source)


FIX = Fix(
    name="selective-recompute",
    symptom="--recompute-modules moe_act or layernorm: NameError 'FP8GlobalStateManager' in the first step",
    cause="CheckpointWithoutOutput takes its default fp8=False for a wish and asks transformer-engine, which is "
          "not there; then it needs a compiler and ninja on every rank",
    versions="0.19.2",
    remove_when="CheckpointWithoutOutput() works without transformer-engine and without a compiler",
    needed=fp8_is_assumed,
    apply=do_without,
)
