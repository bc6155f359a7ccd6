"""Parameters of one device: dense ones (attention, norms, router, embeddings) and experts, by pipeline stage."""

from dataclasses import dataclass

from megatron_mixtral.planning.shape import RunShape


@dataclass(frozen=True)
class StageParameters:
    """Numbers of parameters that one device of a pipeline stage holds."""

    dense: int
    expert: int

    @property
    def total(self) -> int:
        return self.dense + self.expert


def stage_parameters(shape: RunShape, stage: int) -> StageParameters:
    """Each device of a stage holds the same number. Norms and routers are whole on every tensor-parallel rank.

    A model with tied embeddings and several stages holds the shared matrix on the first and on the last.
    """
    config, layout = shape.config, shape.layout
    layers = shape.layers_of_stage(stage)
    router_and_norms = config.hidden_size * (config.num_local_experts + 2)
    dense = layers * (config.attention_parameters // layout.tp + router_and_norms)
    matrix = config.vocab_size * config.hidden_size // layout.tp
    first, last = stage == 0, stage == layout.pp - 1
    dense += matrix * (first + last - (first and last and config.tie_word_embeddings)) + config.hidden_size * last
    experts = layers * (config.num_local_experts // layout.ep)
    return StageParameters(dense, experts * config.expert_parameters // layout.etp)
