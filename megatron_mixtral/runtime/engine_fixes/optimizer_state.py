"""Optimizer state in checkpoints of both forms: repairs of the pinned engine, listed in `engine_fixes`."""

import functools
import inspect
from itertools import zip_longest
from typing import Any

import torch

from megatron_mixtral.runtime.replacements import Replacements

# -- optimizer state across expert-parallel sizes ----------------------------------------------------------


def chained_optimizers_must_be_as_many() -> bool:
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    return "but got {len(state_dict)}" in inspect.getsource(ChainedOptimizer.load_state_dict)


def regroup(saved: dict[Any, Any], wanted: int) -> dict[Any, Any]:
    """A chained optimizer's loaded state for `wanted` optimizers, whatever number it was saved by.

    With experts spread over ranks the engine keeps a dense and an expert optimizer, else one for both. Tensors have
    layout-free keys and were read into the structure of the optimizers that ask for them: at the top, or under 0 and 1.
    The settings of the groups (`param_groups`) and other plain values lie where the optimizers that saved had them.
    """
    parts = {key: value for key, value in saved.items() if isinstance(key, int)}
    top = {key: value for key, value in saved.items() if not isinstance(key, int)}
    if wanted == 1 and parts:  # saved by several, read by one
        groups = [group for part in parts.values() for group in _groups(part)]
        return _joined(_with_groups(parts[0], groups), top)
    if wanted > 1 and top:  # saved by one, read by several
        groups = [{**group, "is_expert_parallel": expert} for expert in (False, True) for group in _groups(top)]
        top = _with_groups(top, groups)
        return {index: _joined(top, parts.get(index, {})) for index in range(wanted)}
    return saved


def _groups(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups of one optimizer's state: inside `optimizer`, where it has fp32 weights of its own, or beside it."""
    return state.get("optimizer", state)["param_groups"]


def _with_groups(state: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    if "optimizer" in state:
        return {**state, "optimizer": {**state["optimizer"], "param_groups": groups}}
    return {**state, "param_groups": groups}


def _joined(settings: dict[str, Any], read: dict[str, Any]) -> dict[str, Any]:
    """Settings of the optimizers that saved, and what was read for this one.

    The engine takes the settings of a group by what the group is, and its parameters by their place in the list.
    """
    joined = {**settings, **read}
    for key in settings.keys() & read.keys():
        if key == "param_groups":
            pairs = zip_longest(settings[key], read[key], fillvalue={})
            joined[key] = [{"params": [], **group, **parameters} for group, parameters in pairs]
        elif isinstance(read[key], dict):
            joined[key] = _joined(settings[key], read[key])
    return joined


def load_from_any_number(replacements: Replacements) -> None:
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    original = ChainedOptimizer.load_state_dict

    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any) -> Any:
        if isinstance(state_dict, dict):
            state_dict = regroup(state_dict, len(self.chained_optimizers))
        return original(self, state_dict)

    replacements.set(ChainedOptimizer, "load_state_dict", load_state_dict)


# -- optimizer state of buckets with padding ----------------------------------------------------------------


def slices_forget_the_padding() -> bool:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return "missing_elems_num" in inspect.getsource(DistributedOptimizer.sharded_param_state_fully_reshardable)


def with_bucket_padding(state: Any, buffers: Any) -> Any:
    """A gathered optimizer state (by gradient buffer, dtype, kind) with each bucket where the buffer has it.

    The engine gathers the buckets without the padding at their ends, then cuts parameters out at offsets that count
    it. None, on ranks that gather nothing, stays None.
    """
    if state is None:
        return None
    for index, buffer in enumerate(buffers):
        last = buffer.buckets[-1]
        for tensors in state[index].values():
            for kind, packed in tensors.items():
                if not hasattr(packed, "new_zeros"):  # the count of elements
                    continue
                whole, at = packed.new_zeros(last.offset + last.grad_data.numel()), 0
                for bucket in buffer.buckets:
                    whole[bucket.offset:bucket.offset + bucket.numel_unpadded] = packed[at:at + bucket.numel_unpadded]
                    at += bucket.numel_unpadded
                tensors[kind] = whole
    return state


def count_the_padding(replacements: Replacements) -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer.sharded_param_state_fully_reshardable

    @functools.wraps(original)
    def sharded_param_state_fully_reshardable(self: Any, *args: Any, **kwargs: Any) -> Any:
        gather = self.get_parameter_state_dp_zero
        self.get_parameter_state_dp_zero = lambda **options: with_bucket_padding(gather(**options), self.buffers)
        try:
            return original(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero  # the class's own again

    replacements.set(DistributedOptimizer, "sharded_param_state_fully_reshardable",
                     sharded_param_state_fully_reshardable)


# -- optimizer state of rank directories --------------------------------------------------------------------


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
