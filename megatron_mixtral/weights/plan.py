"""What each shard of a laid-out Mixtral holds, as pure data: no file, no process group, no torch.

`ShardPlan` lists the tensors of one coordinate and model chunk. Sinks write what it lists, sources look their tensors
up in it, `--dry-run` prints it, and tests compare it with the engine's own model.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod

from megatron_mixtral.config import Coord, MixtralConfig, ParallelLayout
from megatron_mixtral.disk import human_size
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.rules import (
    EMBEDDING,
    OUTPUT,
    PACKED_QKV,
    QKV,
    ROUTER,
    HFTensor,
    Shape,
    WeightRule,
    collapse,
    dense_name,
    hf_tensors,
    walk,
)


@dataclass(frozen=True)
class TensorSlice:
    """One tensor to be stored: `pieces` joined, and of the result units [start, start + length) of the shard dim.

    `view` is the local view, of which `shape` is the stored form. Of `length`, the last `padding` units lie beyond
    the Hugging Face tensor (padded vocabulary) and are zero. `aliases` are its names in the transformer-engine specs.
    """

    name: str
    rule: WeightRule
    pieces: tuple[HFTensor, ...]
    start: int
    length: int
    view: Shape
    padding: int = 0
    aliases: tuple[str, ...] = ()  # other names it is accepted under when read

    @property
    def shape(self) -> Shape:
        return collapse(self.view)

    @property
    def elements(self) -> int:
        return prod(self.view)


def whole(tensor: HFTensor) -> TensorSlice:
    """The slice that is one Hugging Face tensor, whole, under its own name."""
    return TensorSlice(tensor.name, tensor.rule, (tensor,), 0, tensor.view[tensor.rule.shard_dim], tensor.view)


def hf_slices(config: MixtralConfig) -> list[TensorSlice]:
    """What a Hugging Face directory of the model stores, in the model's order: of a dense model its own tensors."""
    tensors = hf_tensors(config)
    if config.dense_config is None:
        return [whole(tensor) for tensor in tensors.values()]
    kind, found = config.model_type, list[TensorSlice]()
    for tensor in tensors.values():
        if tensor.rule is ROUTER:
            continue
        if tensor.rule is not QKV or kind not in PACKED_QKV:
            found.append(replace(whole(tensor), name=dense_name(tensor.name, kind)))
        elif tensor.piece == 0:
            view = QKV.joined_view(config)
            pieces = tuple(tensors[name] for name in QKV.hf_names(tensor.layer, 0))
            found.append(TensorSlice(PACKED_QKV[kind].format(layer=tensor.layer), QKV, pieces, 0, view[0], view))
    return found


def padded_vocabulary(config: MixtralConfig, layout: ParallelLayout, divisible_by: int = 1) -> int:
    """The vocabulary rounded up to a multiple of `divisible_by` x TP, as the engine does it."""
    multiple = divisible_by * layout.tp
    return -(-config.vocab_size // multiple) * multiple


@dataclass(frozen=True)
class ShardPlan:
    """The tensors of one coordinate and virtual-pipeline chunk, under the names of the engine's local spec.

    Layers count from 0 within the chunk and experts from 0 within the expert-parallel rank, as in the engine's
    `state_dict()`. `padded_vocab` None means no padding beyond what TP needs.
    """

    config: MixtralConfig
    layout: ParallelLayout
    coord: Coord
    chunk: int = 0
    padded_vocab: int | None = None

    @property
    def vocab_rows(self) -> int:
        """Rows of the whole embedding including padding."""
        return padded_vocabulary(self.config, self.layout) if self.padded_vocab is None else self.padded_vocab

    def tensors(self) -> list[TensorSlice]:
        """Every tensor of the shard, in the model's order."""
        first = self.layout.is_first(self.coord.pp, self.chunk)
        last = self.layout.is_last(self.coord.pp, self.chunk)
        tensors = hf_tensors(self.config)
        layers = self.layout.layers_of(self.coord.pp, self.config.num_hidden_layers, self.chunk)
        experts = self.layout.experts_of(self.coord.ep, self.config.num_local_experts)
        # Tied: one stage needs no output layer; a last stage of its own keeps a copy of the embedding there.
        return [self._slice(rule, tensors, (layer, expert), (layer - layers.start, expert - experts.start))
                for rule, layer, expert in walk(self.config, layers, experts, first, last)
                if not (rule is OUTPUT and self.config.tie_word_embeddings and first)]

    def extra_states(self) -> list[str]:
        """Names of the engine's `_extra_state` entries, which are None in the local spec."""
        names = [t.name.removesuffix("weight") + "_extra_state" for t in self.tensors() if t.rule.extra_state]
        last = self.layout.is_last(self.coord.pp, self.chunk)
        output = OUTPUT.megatron.removesuffix("weight") + "_extra_state"
        return names + [output] if last and output not in names else names

    def _slice(self, rule: WeightRule, tensors: dict[str, HFTensor], number: tuple[int, int],
               local: tuple[int, int]) -> TensorSlice:
        source = EMBEDDING if rule is OUTPUT and self.config.tie_word_embeddings else rule
        pieces = tuple(tensors[name] for name in source.hf_names(*number))
        size = rule.shard_size(self.config)
        total = self.vocab_rows if rule.padded else size
        ways, index = {"tp": (self.layout.tp, self.coord.tp), "etp": (self.layout.etp, self.coord.etp),
                       None: (1, 0)}[rule.axis]
        assert total % ways == 0, f"{rule.name}: {total} over {rule.axis} {ways}; was the layout validated?"
        length = total // ways
        start = index * length
        names = (rule.megatron, *rule.megatron_aliases)
        name, *aliases = (text.format(layer=local[0], expert=local[1]) for text in names)
        return TensorSlice(name, rule, pieces, start, length, rule.joined_view(self.config, length),
                           padding=min(length, max(0, start + length - size)), aliases=tuple(aliases))


def all_plans(config: MixtralConfig, layout: ParallelLayout, padded_vocab: int | None = None) -> list[ShardPlan]:
    """A plan for every coordinate and chunk of a layout; together they are complete."""
    plans = [ShardPlan(config, layout, coord, chunk, padded_vocab)
             for coord in layout.coords() for chunk in range(layout.vpp)]
    check_complete(plans, config)
    return plans


def check_tiling(tensor: HFTensor, intervals: Iterable[tuple[int, int]], what: str) -> None:
    """Raise `CheckpointError` that begins with `what` unless (start, length) tile the tensor along its shard dim."""
    size, at = tensor.view[tensor.rule.shard_dim], 0
    for start, length in sorted(intervals):
        if start != at:
            raise CheckpointError(f"{what}: units {at} to {start} of {size} are missing or stored twice")
        at += length
    if at != size:
        raise CheckpointError(f"{what}: {at} of {size} units are stored")


def check_complete(plans: Iterable[ShardPlan], config: MixtralConfig) -> None:
    """Raise `CheckpointError` unless the plans together tile every Hugging Face tensor exactly.

    Copies (a norm on every rank, dense weights on every expert-parallel rank) count once: equal intervals are one.
    """
    intervals: dict[str, set[tuple[int, int]]] = {name: set() for name in hf_tensors(config)}
    for plan in plans:
        for tensor in plan.tensors():
            for piece in tensor.pieces:
                if tensor.length > tensor.padding:
                    intervals[piece.name].add((tensor.start, tensor.length - tensor.padding))
    for name, tensor in hf_tensors(config).items():
        check_tiling(tensor, intervals[name], f"{name} in the layout's shards")


def describe(plans: Iterable[ShardPlan], bytes_per_element: int = 2) -> str:
    """A table of what each shard holds and weighs, for people."""
    lines, total = [], 0
    for plan in plans:
        tensors = plan.tensors()
        size = sum(t.elements for t in tensors) * bytes_per_element
        total += size
        layers = plan.layout.layers_of(plan.coord.pp, plan.config.num_hidden_layers, plan.chunk)
        experts = plan.layout.experts_of(plan.coord.ep, plan.config.num_local_experts)
        ends = "".join(f" + {rule.name}" for rule in (EMBEDDING, OUTPUT) if any(t.rule is rule for t in tensors))
        chunk = f" chunk {plan.chunk}" if plan.layout.vpp > 1 else ""
        lines.append(f"pp {plan.coord.pp} tp {plan.coord.tp} ep {plan.coord.ep} etp {plan.coord.etp}{chunk}: "
                     f"layers {layers.start}-{layers.stop - 1}, experts {experts.start}-{experts.stop - 1}{ends}; "
                     f"{len(tensors)} tensors, {human_size(size)}")
    lines.append(f"{len(lines)} shards, {human_size(total)} in all")
    return "\n".join(lines)
