"""Optimizer state in distributed checkpoints: two repairs of the pinned engine, listed in `engine_fixes.FIXES`."""

import functools
import inspect
from typing import Any

from megatron_mixtral.runtime.replacements import Replacements

# -- optimizer state across expert-parallel sizes ----------------------------------------------------------


def chained_optimizers_must_be_as_many() -> bool:
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    return "but got {len(state_dict)}" in inspect.getsource(ChainedOptimizer.load_state_dict)


def regroup(saved: dict[Any, Any], wanted: int) -> dict[Any, Any]:
    """A chained optimizer's loaded state for `wanted` optimizers, whatever number it was saved by.

    With experts spread over ranks the engine keeps a dense and an expert optimizer, else one for both. Tensors have
    layout-free keys; what differs is where the rest lies (`optimizer.param_groups`, `param_state_sharding_type`): under
    0 and 1, or at the top. Numbered entries of a load hold the tensors of the optimizers that ask for them.
    """
    parts = {key: value for key, value in saved.items() if isinstance(key, int)}
    common = {key: value for key, value in saved.items() if not isinstance(key, int)}
    if wanted == 1 and parts and "optimizer" not in common:  # saved by several, wanted by one
        groups = [group for part in parts.values() for group in part["optimizer"]["param_groups"]]
        return {**parts[0], **common, "optimizer": {**parts[0]["optimizer"], "param_groups": groups}}
    if wanted > 1 and "optimizer" in common:  # saved by one, wanted by several
        groups = common["optimizer"]["param_groups"]
        groups = [{**group, "is_expert_parallel": expert} for expert in (False, True) for group in groups]
        common["optimizer"] = {**common["optimizer"], "param_groups": groups}
        return {index: {**common, **parts.get(index, {})} for index in range(wanted)}
    return saved


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
