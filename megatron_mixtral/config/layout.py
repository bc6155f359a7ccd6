"""`ParallelLayout` and `Coord`: how a model is laid over ranks. Pure arithmetic, standard library only.

The orders are the engine's (`megatron.core.parallel_state`, order tp-cp-ep-dp-pp): within a pipeline stage the dense
grid counts tp fastest, then cp, then dp; the expert grid counts etp fastest, then ep, then expert-dp. Both grids
number the same ranks, so with ETP != TP ("folding") only some (tp, ep) pairs exist.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from megatron_mixtral.config.mixtral import MixtralConfig
from megatron_mixtral.errors import ConfigError

TRAINING_FLAGS: Mapping[str, str] = {
    "tp": "--tensor-model-parallel-size", "pp": "--pipeline-model-parallel-size",
    "vpp": "--num-virtual-stages-per-pipeline-rank", "ep": "--expert-model-parallel-size",
    "etp": "--expert-tensor-parallel-size", "cp": "--context-parallel-size",
    "first": "--decoder-first-pipeline-num-layers", "last": "--decoder-last-pipeline-num-layers",
    "world": "--nproc-per-node x --nnodes",
}
TARGET_FLAGS: Mapping[str, str] = {
    "tp": "--target-tensor-parallel-size", "pp": "--target-pipeline-parallel-size",
    "vpp": "--target-virtual-pipeline-parallel-size", "ep": "--target-expert-parallel-size",
    "etp": "--target-expert-tensor-parallel-size", "cp": "--context-parallel-size",
    "first": "--target-first-pipeline-num-layers", "last": "--target-last-pipeline-num-layers",
    "world": "the number of ranks",
}


@dataclass(frozen=True, order=True)
class Coord:
    """One shard of the model: which pipeline stage, and which slice of the dense and of the expert weights."""

    pp: int = 0
    tp: int = 0
    ep: int = 0
    etp: int = 0


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the axes. `etp=None` means TP, as in the engine; `world=None` where no process count is known.

    `first` and `last` are layer counts of an uneven first or last pipeline stage (None: an even share).
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    cp: int = 1
    world: int | None = None
    first: int | None = None
    last: int | None = None

    training_flags: ClassVar[Mapping[str, str]] = TRAINING_FLAGS

    def __post_init__(self) -> None:
        if self.etp is None:
            object.__setattr__(self, "etp", self.tp)
        for axis in ("tp", "pp", "vpp", "ep", "etp", "cp"):
            size = getattr(self, axis)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ConfigError(f"{TRAINING_FLAGS[axis]} ({axis}) must be a positive integer, found {size!r}")

    def __str__(self) -> str:
        parts = [f"tp{self.tp}", f"pp{self.pp}", f"ep{self.ep}"]
        if self.etp != self.tp:
            parts.append(f"etp{self.etp}")
        parts += [f"{axis}{size}" for axis, size in (("vpp", self.vpp), ("cp", self.cp)) if size > 1]
        parts += [f"{end}{count}" for end, count in (("first", self.first), ("last", self.last)) if count is not None]
        return "-".join(parts)

    @property
    def min_world(self) -> int:
        """The smallest number of ranks that holds this layout: pp x lcm(tp x cp, etp x ep)."""
        return self.pp * math.lcm(self.tp * self.cp, self.etp * self.ep)

    @property
    def data_parallel(self) -> int:
        """Data-parallel size of the dense weights; needs `world`."""
        assert self.world is not None, "data_parallel needs a layout with a world size"
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def chunks(self) -> int:
        """Equal chunks into which context parallelism cuts a sequence, two for each of its ranks."""
        return 2 * self.cp if self.cp > 1 else 1

    # -- Refusing --------------------------------------------------------------------------------------

    def validate(self, config: MixtralConfig, flags: Mapping[str, str] = TRAINING_FLAGS,
                 world: str | None = None) -> "ParallelLayout":
        """Return self if `config` can be laid out so; else raise `ConfigError` with the arithmetic and the flag.

        `world` says what changes the number of ranks, in the place of what `flags` says.
        """
        flags = flags if world is None else {**flags, "world": world}

        def divides(axis: str, size: int, what: str, count: int) -> None:
            if count % size:
                fits = [n for n in range(1, count + 1) if count % n == 0 and n <= 4 * size]
                raise ConfigError(f"{what} {count} is not divisible by {axis} {size}: "
                                  f"{count} = {count // size} x {size} + {count % size}; "
                                  f"set {flags[axis]} to one of {', '.join(map(str, fits))}")

        divides("tp", self.tp, "num_key_value_heads (query groups)", config.num_key_value_heads)
        divides("etp", self.etp, "intermediate_size", config.intermediate_size)
        divides("ep", self.ep, "num_local_experts", config.num_local_experts)
        self._validate_stages(config.num_hidden_layers, flags)
        return self.validate_world(flags)

    def validate_world(self, flags: Mapping[str, str] = TRAINING_FLAGS) -> "ParallelLayout":
        """Return self if the number of ranks, where it is known, fits the sizes of any model; else `ConfigError`."""
        sizes = {"tp x pp x cp": self.tp * self.pp * self.cp, "etp x ep x pp": self.etp * self.ep * self.pp}
        for axes, need in sizes.items():
            if self.world is not None and self.world % need:
                raise ConfigError(
                    f"world size {self.world} is not a multiple of {axes} = {need} (layout {self}): it must be a "
                    f"multiple of {self.min_world}; change {flags['world']}, or {flags['tp']}, {flags['pp']}, "
                    f"{flags['ep']}, {flags['etp']}")
        return self

    def _validate_stages(self, layers: int, flags: Mapping[str, str]) -> None:
        if self.vpp > 1 and self.pp == 1:
            raise ConfigError(f"vpp {self.vpp} needs pp > 1; set {flags['vpp']} to 1 or raise {flags['pp']}")
        ends = [count for count in (self.first, self.last) if count is not None]
        if ends and self.pp == 1:
            raise ConfigError(f"an uneven first or last stage needs pp > 1; drop {flags['first']} / {flags['last']}")
        middle, stages = layers - sum(ends), self.pp - len(ends)
        if any(count < 1 for count in ends) or middle < 0 or (stages == 0 and middle != 0):
            raise ConfigError(f"first {self.first} and last {self.last} stage do not add up to {layers} layers over "
                              f"pp {self.pp} stages; change {flags['first']} / {flags['last']}")
        if stages and (middle % stages or middle == 0):
            uneven = f" less the uneven stages ({layers} - {sum(ends)})" if ends else ""
            what = "num_hidden_layers" + uneven
            raise ConfigError(
                f"{what} {middle} is not divisible by pp {stages}{' (even stages)' if ends else ''}: "
                f"{middle} = {middle // stages} x {stages} + {middle % stages}; change {flags['pp']}"
                f"{'' if ends else ' to one of ' + ', '.join(str(n) for n in range(1, layers + 1) if layers % n == 0)}"
                f", or give uneven stages with {flags['first']} / {flags['last']}")
        for pp, count in enumerate(self._stage_sizes(layers)):
            if count % self.vpp:
                raise ConfigError(
                    f"{count} layers of pipeline stage {pp} are not divisible by vpp {self.vpp}: {count} = "
                    f"{count // self.vpp} x {self.vpp} + {count % self.vpp}; change {flags['vpp']}")

    # -- Where things are --------------------------------------------------------------------------------

    def _stage_sizes(self, layers: int) -> list[int]:
        ends = [count for count in (self.first, self.last) if count is not None]
        stages = self.pp - len(ends)
        sizes = [(layers - sum(ends)) // stages] * stages if stages else []
        if self.first is not None:
            sizes.insert(0, self.first)
        if self.last is not None:
            sizes.append(self.last)
        return sizes

    def layers_of(self, pp: int, layers: int, chunk: int = 0) -> range:
        """Global layer numbers of one pipeline stage's model chunk.

        With vpp > 1, chunk c of every stage lies before chunk c + 1 of any stage (interleaved schedule), as in
        `megatron.core.transformer.transformer_layer.get_transformer_layer_offset`.
        """
        sizes = [count // self.vpp for count in self._stage_sizes(layers)]
        start = chunk * sum(sizes) + sum(sizes[:pp])
        return range(start, start + sizes[pp])

    def experts_of(self, ep: int, experts: int) -> range:
        """Global expert numbers of one expert-parallel rank: consecutive blocks."""
        local = experts // self.ep
        return range(ep * local, (ep + 1) * local)

    def is_first(self, pp: int, chunk: int = 0) -> bool:
        """Whether this chunk holds the embedding."""
        return pp == 0 and chunk == 0

    def is_last(self, pp: int, chunk: int = 0) -> bool:
        """Whether this chunk holds the final norm and the output layer."""
        return pp == self.pp - 1 and chunk == self.vpp - 1

    def coord_of(self, rank: int) -> Coord:
        """The shard that a global rank holds; needs `world`."""
        assert self.world is not None, "coord_of needs a layout with a world size"
        per_stage = self.world // self.pp
        inner = rank % per_stage
        return Coord(pp=rank // per_stage, tp=inner % self.tp, ep=(inner // self.etp) % self.ep, etp=inner % self.etp)

    def coords(self) -> Iterator[Coord]:
        """Every distinct shard, once, in order: the files of a rank-directory checkpoint.

        Within a stage, (tp, ep) pairs repeat after lcm(tp, etp x ep) ranks; with ETP == TP they fill the whole grid.
        """
        distinct = {Coord(pp, inner % self.tp, (inner // self.etp) % self.ep, inner % self.etp)
                    for pp in range(self.pp) for inner in range(math.lcm(self.tp, self.etp * self.ep))}
        return iter(sorted(distinct))
