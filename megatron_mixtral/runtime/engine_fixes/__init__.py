"""Repairs of the pinned engine that every machine needs: one module, one defect, with its record (`Fix`) at the end."""

from megatron_mixtral.runtime.engine_fixes import (
    adam,
    bucket_padding,
    dataset_helpers,
    expert_optimizers,
    multi_tensor,
    nonfinite,
    optimizer_load,
    rank_directories,
    recompute,
    step_log,
)
from megatron_mixtral.runtime.gpu import PERMUTATION, ROTATION, WEIGHT_GRADIENTS

__all__ = ["FIXES", "TRAINING_FIXES"]

# `expert_optimizers` comes after `optimizer_load`, so that it acts before: it puts groups where this run has them.
FIXES = (dataset_helpers.FIX, adam.FIX, multi_tensor.FIX, optimizer_load.FIX, expert_optimizers.FIX,
         optimizer_load.SGD_FIX, bucket_padding.FIX, rank_directories.FIX, nonfinite.FIX, recompute.FIX,
         WEIGHT_GRADIENTS, ROTATION, PERMUTATION)
# Of `megatron.training`.
TRAINING_FIXES = (step_log.TRAINING_FIX, rank_directories.TRAINING_FIX, multi_tensor.TRAINING_FIX)
