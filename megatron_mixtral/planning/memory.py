"""Memory of one device, by kind, at the fullest moment of a step. Bytes.

Weights, gradients, optimizer state and the cache of evaluations are counted exactly as they are allocated. Activations
are what the autograd graph keeps, counted tensor by tensor in `activations.py`; so are temporaries of the experts'
backward pass.
Not counted: the device's context, communication buffers, fragmentation; the planner leaves room for them.
"""

from dataclasses import dataclass

from megatron_mixtral.planning import activations
from megatron_mixtral.planning.shape import RunShape, StageParameters, Summed


@dataclass(frozen=True)
class Memory(Summed):
    """Bytes on one device of a pipeline stage."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    temporaries: float  # of the experts' backward pass, as far as they are not there beside the logits
    evaluation_cache: float = 0.0  # keys and values of a run that asks its model as it learns


def stage_memory(shape: RunShape, stage: int) -> Memory:
    """The fullest moment of one device of a pipeline stage."""
    trained = shape.trained_of_stage(stage)
    return Memory(
        weights=_weights(shape, stage),
        gradients=trained.total * 4,  # fp32 whatever the weights are: small gradients add up over micro-batches
        optimizer=_optimizer(shape, trained),
        **_within_a_pass(shape, stage),
        evaluation_cache=0 if shape.cache is None else shape.cache.size(
            shape.config, shape.layout.tp, shape.layers_of_stage(stage), shape.weight_bytes))


def _weights(shape: RunShape, stage: int) -> float:
    """The model, its linears in 4 bits if they are, and adapters beside it."""
    model, adapter = shape.parameters_of_stage(stage), shape.adapter
    if adapter is None:
        return model.total * shape.weight_bytes
    size = (model.total + shape.trained_of_stage(stage).total) * shape.weight_bytes
    if adapter.quantized:
        layers = shape.layers_of_stage(stage)
        linears = layers * (shape.config.attention_parameters // shape.layout.tp) + model.expert
        size += linears * (adapter.packed_bytes(shape.weight_bytes) - shape.weight_bytes)
    return size


def fullest_stage(shape: RunShape) -> int:
    """The pipeline stage that needs most."""
    return max(range(shape.layout.pp), key=lambda stage: stage_memory(shape, stage).total)


def _optimizer(shape: RunShape, parameters: StageParameters) -> float:
    """Adam's two fp32 moments, and an fp32 copy of weights that are not fp32; sharded by the distributed optimizer."""
    size = 8 if shape.weight_bytes == 4 else 12
    if not shape.distributed_optimizer:
        return parameters.total * size
    return size * (parameters.dense / shape.dense_replicas + parameters.expert / shape.expert_data_parallel)


def _within_a_pass(shape: RunShape, stage: int) -> dict[str, float]:
    """What a micro-batch needs. When the backward pass of a layer begins, the logits are gone; one layer at a time has
    what is computed again.
    """
    chunks, vpp = shape.chunks_in_flight(stage), shape.layout.vpp
    kept = chunks * shape.layers_of_stage(stage) / vpp * activations.layer(shape)
    if stage == 0:
        kept += chunks / vpp * activations.embedding(shape)
    again = 0.0
    if shape.recompute != "none":
        again = activations.layer(shape, recompute="none")
        again -= activations.layer(shape) if shape.recompute == "selective" else 0.0
    logits = activations.logits(shape) if stage == shape.layout.pp - 1 else 0.0
    beyond = max(0.0, logits - again)
    return {"activations": kept + max(0.0, again - logits), "logits": logits,
            "temporaries": max(0.0, activations.temporaries(shape, stage) - beyond)}
