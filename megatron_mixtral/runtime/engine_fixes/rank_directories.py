"""Optimizer state of rank directories (`--ckpt-format torch`): how it is set, and which step's is taken."""

import inspect
from typing import Any

import torch

from megatron_mixtral.runtime.replacements import Fix, around, source_has


def _fp32_weights_are_leaves() -> bool:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    setters = (DistributedOptimizer.load_parameter_state_from_dp_zero,
               DistributedOptimizer._set_main_param_and_optimizer_states)
    return not any("no_grad" in inspect.getsource(setter) for setter in setters)


def _set_without_gradients(set_states: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return set_states(*args, **kwargs)


def _let_the_tracker_say_ckpt_step(read_metadata: Any, tracker: str) -> tuple[int, bool]:
    from megatron.training.checkpointing import get_checkpoint_tracker_filename
    from megatron.training.global_vars import get_args

    if not torch.distributed.is_initialized():  # for --use-checkpoint-args: there are no arguments yet
        return read_metadata(tracker)
    args = get_args()
    of_the_run = [get_checkpoint_tracker_filename(directory)
                  for directory in (args.load, args.pretrained_checkpoint) if directory]
    return (args.ckpt_step, False) if args.ckpt_step and tracker in of_the_run else read_metadata(tracker)


FIX = Fix(
    name="fp32-rank-directories",
    symptom="an fp32 run with the distributed optimizer cannot go on from rank directories (--ckpt-format torch): "
            "'a view of a leaf Variable that requires grad is being used in an in-place operation'",
    cause="the optimizer's fp32 weights are then views of the model's own, and are set with gradients enabled",
    versions="0.19.2",
    remove_when="load_parameter_state_from_dp_zero sets weights under torch.no_grad",
    needed=_fp32_weights_are_leaves,
    apply=around("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
                 _set_without_gradients),
)

TRAINING_FIX = Fix(
    name="rank-directories-step",
    symptom="--ckpt-step with rank directories and the distributed optimizer: the weights are those of that step, "
            "the optimizer's state and the iteration those of the last one, without a word",
    cause="load_checkpoint reads the tracker a second time for the optimizer's file, and forgets --ckpt-step",
    versions="0.19.2",
    remove_when="load_checkpoint takes the optimizer's file from the directory of the weights",
    needed=source_has("megatron.training.checkpointing:load_checkpoint", "manual read of the tracker file"),
    apply=around("megatron.training.checkpointing:read_metadata", _let_the_tracker_say_ckpt_step),
)
