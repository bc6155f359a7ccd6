"""`RunShape`: a model on a layout with its batch and the choices that decide memory. Validates itself."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from megatron_mixtral.config import AdapterConfig, MixtralConfig, ParallelLayout
from megatron_mixtral.errors import ConfigError

RECOMPUTE = ("none", "selective", "full")


class Summed:
    """A record of figures of one unit."""

    @property
    def total(self) -> float:
        """All of them together."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class StageParameters(Summed):
    """Numbers of parameters that one device of a pipeline stage holds."""

    dense: int  # attention, norms, router, embeddings
    expert: int


@dataclass(frozen=True)
class CacheShape:
    """A cache of keys and values: so many slots, each of so many tokens."""

    slots: int
    length: int
    PAGE: ClassVar[int] = 256  # tokens: memory is taken in whole pages, in which the kernel for GPUs reads it

    @property
    def places(self) -> int:
        """Tokens of a slot for which there is memory."""
        return -(-self.length // self.PAGE) * self.PAGE

    def size(self, config: MixtralConfig, tp: int, layers: int, element_size: int) -> int:
        """Bytes on a device: 2 (keys and values) x layers x slots x places x groups x d x element."""
        groups = config.num_key_value_heads // tp
        return 2 * layers * self.slots * self.places * groups * config.head_dim * element_size


@dataclass(frozen=True)
class RunShape:
    """One run. `layout.world` must be known.

    `recompute`: "none"; "selective": the experts' activation function and the norms are computed again in the backward
    pass; "full": a layer keeps only its input. `weight_bytes` of a parameter is 2 (bf16) or 4 (fp32). Of a run with
    `adapter` these alone have gradients and an optimizer, and the linears of the model may be in 4 bits.
    """

    config: MixtralConfig
    layout: ParallelLayout
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    recompute: str = "none"
    weight_bytes: int = 2
    distributed_optimizer: bool = True
    adapter: AdapterConfig | None = None  # what is trained, if not the whole model
    cache: CacheShape | None = None  # of a run that asks its model as it learns; it stays allocated

    def __post_init__(self) -> None:
        layout, data_parallel = self.layout, self.layout.data_parallel
        if self.recompute not in RECOMPUTE:
            raise ConfigError(f"recompute {self.recompute!r}: expected one of {', '.join(RECOMPUTE)}")
        for flag, value in (("--seq-length", self.seq_length), ("--micro-batch-size", self.micro_batch_size),
                            ("--global-batch-size", self.global_batch_size)):
            if value < 1:
                raise ConfigError(f"{flag} must be a positive integer, found {value}")
        if self.adapter is not None:
            self.adapter.check_blocks(layout)
        step = self.micro_batch_size * data_parallel
        if self.global_batch_size % step:
            raise ConfigError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of --micro-batch-size x data parallel "
                f"= {self.micro_batch_size} x {data_parallel} = {step} (data parallel = {layout.world} devices / "
                f"(tp {layout.tp} x pp {layout.pp} x cp {layout.cp})): give a multiple of {step}")
        if layout.vpp > 1 and self.micro_batches % layout.pp:
            raise ConfigError(
                f"virtual pipeline stages need the number of micro-batches to be a multiple of pp {layout.pp}, found "
                f"{self.micro_batches} = {self.global_batch_size} / {step}; change --global-batch-size, or leave "
                "--num-virtual-stages-per-pipeline-rank out")
        shards = math.lcm(layout.chunks, layout.tp * layout.cp)
        if over := self.seq_length % shards:
            cut = f"2 x cp = 2 x {layout.cp} = {layout.chunks}" if layout.cp > 1 else f"tp = {layout.tp}"
            if shards not in (layout.chunks, layout.tp):
                cut += f" and by tp x cp = {layout.tp} x {layout.cp}"
            raise ConfigError(f"--seq-length {self.seq_length} is not divisible by {cut}, the parts into which devices "
                              f"cut a sequence: {self.seq_length} = {self.seq_length // shards} x {shards} + {over}; "
                              f"give {self.seq_length - over or shards} or {self.seq_length - over + shards}, or "
                              "change --context-parallel-size or --tensor-model-parallel-size")

    @cached_property
    def micro_batches(self) -> int:
        """Micro-batches of one optimizer step on one pipeline."""
        return self.global_batch_size // (self.micro_batch_size * self.layout.data_parallel)

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer step over all devices."""
        return self.global_batch_size * self.seq_length

    @property
    def tokens_per_micro_batch(self) -> int:
        """Tokens of one micro-batch in one context-parallel rank; its tensor-parallel ranks share them."""
        return self.micro_batch_size * self.seq_length // self.layout.cp

    @property
    def expert_data_parallel(self) -> int:
        """Replicas of an expert's shard: world / (etp x ep x pp)."""
        layout = self.layout
        return layout.world // (layout.etp * layout.ep * layout.pp)

    @property
    def dense_replicas(self) -> int:
        """Replicas over which dense gradients are reduced: data parallel x context parallel."""
        return self.layout.data_parallel * self.layout.cp

    def layers_of_stage(self, stage: int) -> int:
        """Transformer layers of a pipeline stage, all its virtual chunks together."""
        layers = self.config.num_hidden_layers
        return sum(len(self.layout.layers_of(stage, layers, chunk)) for chunk in range(self.layout.vpp))

    def parameters_of_stage(self, stage: int) -> StageParameters:
        """Each device of a stage holds the same number. Norms and routers are whole on every tensor-parallel rank.

        A model with tied embeddings and several stages holds the shared matrix on the first and on the last.
        """
        config, layout, layers = self.config, self.layout, self.layers_of_stage(stage)
        router_and_norms = config.hidden_size * (config.num_local_experts + 2)
        dense = layers * (config.attention_parameters // layout.tp + router_and_norms)
        matrix = config.vocab_size * config.hidden_size // layout.tp
        first, last = stage == 0, stage == layout.pp - 1
        dense += matrix * (first + last - (first and last and config.tie_word_embeddings)) + config.hidden_size * last
        experts = layers * (config.num_local_experts // layout.ep)
        return StageParameters(dense, experts * config.expert_parameters // layout.etp)

    def trained_of_stage(self, stage: int) -> StageParameters:
        """What is trained of `parameters_of_stage`, or of adapters: A or B of a linear is cut as the linear is."""
        if self.adapter is None:
            return self.parameters_of_stage(stage)
        config, layout, layers = self.config, self.layout, self.layers_of_stage(stage)
        hidden, width = config.hidden_size, config.intermediate_size // layout.etp
        queries, keys = (heads * config.head_dim // layout.tp for heads in (
            config.num_attention_heads, config.num_key_value_heads))
        sides = {"q_proj": hidden + queries, "k_proj": hidden + keys, "v_proj": hidden + keys,
                 "o_proj": queries + hidden, "gate": hidden + config.num_local_experts,
                 **dict.fromkeys(("w1", "w2", "w3"), (hidden + width) * config.num_local_experts // layout.ep)}
        counts = {name: layers * self.adapter.rank * sides[name] for name in self.adapter.targets}
        experts = sum(count for name, count in counts.items() if name in ("w1", "w2", "w3"))
        return StageParameters(sum(counts.values()) - experts, experts)

    # -- The pipeline schedule: 1F1B, or the interleaved one of Narayanan et al. 2021 (arXiv 2104.04473, 2.2), as
    # `megatron.core.pipeline_parallel.schedules` has them.

    @property
    def bubble(self) -> float:
        """Idle time of a pipeline as a share of the time at work: (pp - 1) / (vpp x micro-batches)."""
        return (self.layout.pp - 1) / (self.layout.vpp * self.micro_batches)

    def chunks_in_flight(self, stage: int) -> int:
        """Model chunks whose activations a stage holds at its fullest moment.

        1F1B: a stage is pp - stage - 1 micro-batches ahead of the first backward, and holds one more. Interleaved: each
        stage warms up with 2 (pp - stage - 1) + (vpp - 1) pp chunks. No schedule holds more than there are.
        """
        pp, vpp = self.layout.pp, self.layout.vpp
        if vpp == 1:
            return min(self.micro_batches, pp - stage)
        return min(self.micro_batches * vpp, 2 * (pp - stage - 1) + (vpp - 1) * pp + 1)
