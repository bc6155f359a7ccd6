"""The pipeline schedule: how many micro-batches are in flight, and how long a pipeline stands idle.

The formulas are those of the two schedules of `megatron.core.pipeline_parallel.schedules`: 1F1B, and the interleaved
one of Narayanan et al. 2021 (arXiv 2104.04473, section 2.2).
"""

from megatron_mixtral.planning.shape import RunShape


def bubble(shape: RunShape) -> float:
    """Idle time as a share of the time at work: (pp - 1) / (vpp x micro-batches)."""
    return (shape.layout.pp - 1) / (shape.layout.vpp * shape.micro_batches)


def chunks_in_flight(shape: RunShape, stage: int) -> int:
    """Model chunks whose activations a stage holds at its fullest moment.

    1F1B: a stage is pp - stage - 1 micro-batches ahead of the first backward, and holds one more. Interleaved: each
    stage warms up with 2 (pp - stage - 1) + (vpp - 1) pp chunks. No schedule holds more than there are.
    """
    pp, vpp = shape.layout.pp, shape.layout.vpp
    if vpp == 1:
        return min(shape.micro_batches, pp - stage)
    warm_up = 2 * (pp - stage - 1) + (vpp - 1) * pp
    return min(shape.micro_batches * vpp, warm_up + 1)


def layers_in_flight(shape: RunShape, stage: int) -> float:
    """Layers times micro-batches whose activations a stage holds at its fullest moment."""
    return chunks_in_flight(shape, stage) * shape.layers_of_stage(stage) / shape.layout.vpp
