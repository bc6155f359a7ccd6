"""Optimizer state of rank directories (`--ckpt-format torch`): how it is set, and which step's is taken."""

import functools
import inspect

import torch

from megatron_mixtral.runtime.replacements import Fix, Replacements


def fp32_weights_are_leaves() -> bool:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    setters = (DistributedOptimizer.load_parameter_state_from_dp_zero,
               DistributedOptimizer._set_main_param_and_optimizer_states)
    return not any("no_grad" in inspect.getsource(setter) for setter in setters)


def set_without_gradients(replacements: Replacements) -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    name = "_set_main_param_and_optimizer_states"
    replacements.set(DistributedOptimizer, name, torch.no_grad()(getattr(DistributedOptimizer, name)))


def tracker_is_read_again() -> bool:
    from megatron.training import checkpointing

    return "manual read of the tracker file" in inspect.getsource(checkpointing.load_checkpoint)


def let_the_tracker_say_ckpt_step(replacements: Replacements) -> None:
    from megatron.training import checkpointing
    from megatron.training.global_vars import get_args

    original = checkpointing.read_metadata

    @functools.wraps(original)
    def read_metadata(tracker: str) -> tuple[int, bool]:
        if not torch.distributed.is_initialized():  # for --use-checkpoint-args: there are no arguments yet
            return original(tracker)
        args = get_args()
        of_the_run = [checkpointing.get_checkpoint_tracker_filename(directory)
                      for directory in (args.load, args.pretrained_checkpoint) if directory]
        return (args.ckpt_step, False) if args.ckpt_step and tracker in of_the_run else original(tracker)

    replacements.set(checkpointing, "read_metadata", read_metadata)


FIX = Fix(
    name="fp32-rank-directories",
    symptom="an fp32 run with the distributed optimizer cannot go on from rank directories (--ckpt-format torch): "
            "'a view of a leaf Variable that requires grad is being used in an in-place operation'",
    cause="the optimizer's fp32 weights are then views of the model's own, and are set with gradients enabled",
    versions="0.19.2",
    remove_when="load_parameter_state_from_dp_zero sets weights under torch.no_grad",
    needed=fp32_weights_are_leaves,
    apply=set_without_gradients,
)

TRAINING_FIX = Fix(
    name="rank-directories-step",
    symptom="--ckpt-step with rank directories and the distributed optimizer: the weights are those of that step, "
            "the optimizer's state and the iteration those of the last one, without a word",
    cause="load_checkpoint reads the tracker a second time for the optimizer's file, and forgets --ckpt-step",
    versions="0.19.2",
    remove_when="load_checkpoint takes the optimizer's file from the directory of the weights",
    needed=tracker_is_read_again,
    apply=let_the_tracker_say_ckpt_step,
)
