"""Communication volume: the bytes that one device sends in one optimizer step, by parallel axis.

Counted the way ring algorithms move data: an all-gather or a reduce-scatter over n devices sends (n - 1) parts of 1/n
of the whole from each device, an all-to-all keeps 1/n at home. `tests/distributed/test_planning_measured.py` counts the
collectives of a real step against it.
"""

from dataclasses import dataclass

from megatron_mixtral.planning.shape import RunShape, Summed

# Passes over the sequence-parallel boundary of a layer's attention in one micro-batch. Forward: all-gather, reduce-
# scatter; backward: their opposites, and the input gathered once more for the weight gradient, if there is one.
_ATTENTION_PASSES, _FROZEN_PASSES = 5, 4
# Expert tensor parallelism: tokens are gathered before the experts and reduced after them, forward and backward. The
# engine reduces in the type of the router's probabilities, fp32, and gathers that reduction's gradient in it.
_EXPERT_TENSOR_PASSES, _EXPERT_TENSOR_PASSES_FP32 = 2, 2
# Dispatch and combine, forward and backward.
_ALL_TO_ALLS = 4


@dataclass(frozen=True)
class Volume(Summed):
    """Bytes sent by one device of a stage in one optimizer step."""

    tensor: float  # tensor parallelism of attention, embedding and output layer
    expert_tensor: float
    expert: float  # all-to-all of tokens between experts
    pipeline: float
    context: float
    dense_gradients: float  # gradients reduced, weights gathered, over data-parallel replicas
    expert_gradients: float


def communication_volume(shape: RunShape, stage: int) -> Volume:
    """What one device of pipeline stage `stage` sends."""
    layout, config, parameters = shape.layout, shape.config, shape.trained_of_stage(stage)
    hidden = shape.tokens_per_micro_batch * config.hidden_size * shape.weight_bytes  # one activation, bytes
    rounds = shape.layers_of_stage(stage) * shape.micro_batches
    again = 1.5 if shape.recompute == "full" else 1.0  # the forward half is done twice
    routed = hidden / layout.tp * config.num_experts_per_tok  # copies of tokens that leave one device's router
    tensor = _attention_passes(shape) * rounds * again * hidden * (layout.tp - 1) / layout.tp
    tensor += _outer_tensor(shape, stage, hidden)
    return Volume(
        tensor=tensor,
        expert_tensor=(_EXPERT_TENSOR_PASSES + _EXPERT_TENSOR_PASSES_FP32 * 4 / shape.weight_bytes) * rounds * again
        * routed * (layout.etp - 1),
        expert=_ALL_TO_ALLS * rounds * again * routed * (layout.ep - 1) / layout.ep,
        pipeline=_pipeline(shape, stage, hidden),
        context=_context(shape, rounds * again),
        dense_gradients=_replicas(shape, parameters.dense, shape.dense_replicas),
        expert_gradients=_replicas(shape, parameters.expert, shape.expert_data_parallel))


def _attention_passes(shape: RunShape) -> float:
    """In activations. What the As of q, k, v and o make is gathered or reduced too, forward and backward."""
    if shape.adapter is None:
        return _ATTENTION_PASSES
    adapted = sum(name in shape.adapter.targets for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    return _FROZEN_PASSES + 2 * adapted * shape.adapter.rank / shape.config.hidden_size


def _outer_tensor(shape: RunShape, stage: int, hidden: float) -> float:
    """Embedding (reduce-scatter forward, all-gather backward unless it is frozen) and output layer (all-gather,
    reduce-scatter).
    """
    layout = shape.layout
    passes = (2 if shape.adapter is None else 1) * (stage == 0) + 2 * (stage == layout.pp - 1)
    return passes * shape.micro_batches * hidden * (layout.tp - 1) / layout.tp


def _pipeline(shape: RunShape, stage: int, hidden: float) -> float:
    """Activations to the next chunk, gradients to the one before. The first chunk sends no gradient, the last no
    activation.
    """
    layout = shape.layout
    sends = 2 * layout.vpp - (stage == 0) - (stage == layout.pp - 1) if layout.pp > 1 else 0
    return sends * shape.micro_batches * hidden / layout.tp


def _context(shape: RunShape, rounds: float) -> float:
    """Keys and values gathered by every context-parallel rank, and their gradients reduced and scattered."""
    layout, config = shape.layout, shape.config
    width = 2 * config.num_key_value_heads * config.head_dim / layout.tp
    return 2 * rounds * shape.tokens_per_micro_batch * width * shape.weight_bytes * (layout.cp - 1)


def _replicas(shape: RunShape, parameters: int, replicas: int) -> float:
    """Reduce-scatter of fp32 gradients, then an all-gather of weights (distributed optimizer) or of gradients."""
    gathered = shape.weight_bytes if shape.distributed_optimizer else 4
    return parameters * (4 + gathered) * (replicas - 1) / replicas
