"""Optimizer state of gradient buckets with padding between them."""

from typing import Any

from megatron_mixtral.runtime.replacements import Fix, around, source_has

_PLACE = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.sharded_param_state_fully_reshardable"


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


def _count_the_padding(sharded_state: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    gather = optimizer.get_parameter_state_dp_zero
    optimizer.get_parameter_state_dp_zero = lambda **options: with_bucket_padding(gather(**options), optimizer.buffers)
    try:
        return sharded_state(optimizer, *args, **kwargs)
    finally:
        del optimizer.get_parameter_state_dp_zero  # the class's own again


FIX = Fix(
    name="bucket-padding",
    symptom="with --overlap-grad-reduce (several buckets), a data-parallel size that the buckets' lengths are no "
            "multiple of, and --dist-ckpt-optim-fully-reshardable, the saved optimizer and fp32 weights are wrong",
    cause="the gathered state has no padding between buckets, and parameters are cut out of it at offsets that "
          "count the padding; what overshoots is filled with zeros (NVIDIA/Megatron-LM#5077)",
    versions="0.16.1 to 0.19.2",
    remove_when="sharded_param_state_fully_reshardable subtracts the padding of the buckets before a parameter",
    needed=source_has(_PLACE, "missing_elems_num"),
    apply=around(_PLACE, _count_the_padding),
)
