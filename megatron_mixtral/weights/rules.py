"""The ten weight rules of Mixtral: the only place where Hugging Face names and Megatron names meet.

A rule says of one Megatron tensor: its names, the Hugging Face tensors ("pieces") it is made of, and the *view* of each
piece in which joining is a concatenation along `join_dim` and tensor parallelism is a plain interval of `shard_dim`.
The two dims differ wherever there is more than one piece, so slicing and joining commute, and a shard can be read
from, or written to, any other slicing of the same tensor without assembling the whole. Import, export, resharding
and the reading of distributed checkpoints all walk this table. The rules of adapters (LoRA) are derived from it, so
that adapters move by the same code. Standard library only.

Legend: V vocabulary, H hidden, F expert intermediate, E experts, L layers, g query groups, q query heads of a group,
d head_dim. Collapsing a view's leading dims gives the stored matrix: (g, q*d, H) is stored as (g*q*d, H).

Sources of the formats: Hugging Face, `block_sparse_moe` as every published Mixtral has it on disk, and the fused names
that transformers 5 uses in memory; Megatron, `GPTModel.state_dict()` and `sharded_state_dict()` of megatron-core 0.19.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod

from megatron_mixtral.config import AdapterConfig, MixtralConfig

Shape = tuple[int, ...]

_LAYER = "model.layers.{layer}."
_EXPERT = _LAYER + "block_sparse_moe.experts.{expert}."
_FUSED = _LAYER + "mlp.experts."
_DECODER = "decoder.layers.{layer}."
_DIST = "decoder.layers."


def collapse(view: Shape) -> Shape:
    """The stored shape of a view: all but the last dim multiplied together."""
    return view if len(view) < 2 else (prod(view[:-1]), view[-1])


def narrowed(view: Shape, dim: int, length: int) -> Shape:
    """A view with `length` units in one dim."""
    return (*view[:dim], length, *view[dim + 1:])


@dataclass(frozen=True)
class Fused:
    """Where a piece lies in a tensor over all experts: `tensor[expert]`, rows `part` of `parts` equal parts."""

    name: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Piece:
    """One Hugging Face tensor of a rule: its name on disk, its view, and other names it is accepted under."""

    hf: str
    view: Callable[[MixtralConfig], Shape]
    alias: str | None = None
    fused: Fused | None = None


@dataclass(frozen=True)
class WeightRule:
    """One line of the network; see the module's docstring.

    `axis` is the process axis that shards `shard_dim`: "tp", "etp", or None (every rank holds all of it).
    `owner` says which pipeline stage has it: "first", "layer" (the stage of that layer) or "last".
    `megatron` is the local spec's name, `megatron_aliases` those of the transformer-engine specs.
    `dist_keys` are the keys of a distributed checkpoint, ours first; layer (and expert) are leading dims there.
    """

    name: str
    megatron: str
    pieces: tuple[Piece, ...]
    owner: str
    dist_keys: tuple[str, ...]
    axis: str | None = None
    shard_dim: int = 0
    join_dim: int = 0
    megatron_aliases: tuple[str, ...] = ()
    extra_state: bool = False  # the engine keeps a `_extra_state` entry (None without fp8) beside this weight
    padded: bool = False  # `shard_dim` counts vocabulary rows, which Megatron may pad

    @property
    def per_expert(self) -> bool:
        """Whether there is one such tensor for each expert of a layer."""
        return "{expert}" in self.megatron

    def joined_view(self, config: MixtralConfig, length: int | None = None) -> Shape:
        """The view of all pieces joined: of `length` units along `shard_dim`, or (None) unsharded and unpadded."""
        views = [piece.view(config) for piece in self.pieces]
        whole = narrowed(views[0], self.join_dim, sum(view[self.join_dim] for view in views))
        return whole if length is None else narrowed(whole, self.shard_dim, length)

    def shard_size(self, config: MixtralConfig) -> int:
        """Units along `shard_dim` (query groups, ffn rows, vocabulary rows, ...), unpadded."""
        return self.pieces[0].view(config)[self.shard_dim]

    def hf_names(self, layer: int, expert: int) -> tuple[str, ...]:
        """The canonical Hugging Face names of the pieces, in the order they are joined."""
        return tuple(piece.hf.format(layer=layer, expert=expert) for piece in self.pieces)


def _hidden(c: MixtralConfig) -> Shape:
    return (c.hidden_size,)


def _vocabulary(c: MixtralConfig) -> Shape:
    return (c.vocab_size, c.hidden_size)


def _queries(c: MixtralConfig) -> Shape:
    per_group = c.num_attention_heads // c.num_key_value_heads
    return (c.num_key_value_heads, per_group * c.head_dim, c.hidden_size)


def _keys(c: MixtralConfig) -> Shape:
    return (c.num_key_value_heads, c.head_dim, c.hidden_size)


def _gate(c: MixtralConfig) -> Shape:
    return (1, c.intermediate_size, c.hidden_size)


EMBEDDING = WeightRule(
    name="embedding", owner="first", axis="tp", padded=True,
    megatron="embedding.word_embeddings.weight",
    dist_keys=("embedding.word_embeddings.weight",),
    pieces=(Piece("model.embed_tokens.weight", _vocabulary),))
INPUT_NORM = WeightRule(
    name="input_layernorm", owner="layer",
    megatron=_DECODER + "input_layernorm.weight",
    megatron_aliases=(_DECODER + "self_attention.linear_qkv.layer_norm_weight",),
    dist_keys=(_DIST + "self_attention.linear_qkv.layer_norm_weight", _DIST + "input_layernorm.weight"),
    pieces=(Piece(_LAYER + "input_layernorm.weight", _hidden),))
QKV = WeightRule(
    name="qkv", owner="layer", axis="tp", shard_dim=0, join_dim=1, extra_state=True,
    megatron=_DECODER + "self_attention.linear_qkv.weight",
    dist_keys=(_DIST + "self_attention.linear_qkv.weight",),
    pieces=(Piece(_LAYER + "self_attn.q_proj.weight", _queries),
            Piece(_LAYER + "self_attn.k_proj.weight", _keys),
            Piece(_LAYER + "self_attn.v_proj.weight", _keys)))
PROJ = WeightRule(
    name="proj", owner="layer", axis="tp", shard_dim=1, extra_state=True,
    megatron=_DECODER + "self_attention.linear_proj.weight",
    dist_keys=(_DIST + "self_attention.linear_proj.weight",),
    pieces=(Piece(_LAYER + "self_attn.o_proj.weight",
                  lambda c: (c.hidden_size, c.num_attention_heads * c.head_dim)),))
PRE_MLP_NORM = WeightRule(
    name="pre_mlp_layernorm", owner="layer",
    megatron=_DECODER + "pre_mlp_layernorm.weight",
    dist_keys=(_DIST + "pre_mlp_layernorm.weight", _DIST + "mlp.linear_fc1.layer_norm_weight"),
    pieces=(Piece(_LAYER + "post_attention_layernorm.weight", _hidden),))
ROUTER = WeightRule(
    name="router", owner="layer",
    megatron=_DECODER + "mlp.router.weight",
    dist_keys=(_DIST + "mlp.router.weight",),
    pieces=(Piece(_LAYER + "block_sparse_moe.gate.weight", lambda c: (c.num_local_experts, c.hidden_size),
                  alias=_LAYER + "mlp.gate.weight"),))
FC1 = WeightRule(
    name="fc1", owner="layer", axis="etp", shard_dim=1, join_dim=0, extra_state=True,
    megatron=_DECODER + "mlp.experts.local_experts.{expert}.linear_fc1.weight",
    megatron_aliases=(_DECODER + "mlp.experts.linear_fc1.weight{expert}",),
    dist_keys=(_DIST + "mlp.experts.experts.linear_fc1.weight",),
    pieces=(Piece(_EXPERT + "w1.weight", _gate, fused=Fused(_FUSED + "gate_up_proj", 0, 2)),
            Piece(_EXPERT + "w3.weight", _gate, fused=Fused(_FUSED + "gate_up_proj", 1, 2))))
FC2 = WeightRule(
    name="fc2", owner="layer", axis="etp", shard_dim=1, extra_state=True,
    megatron=_DECODER + "mlp.experts.local_experts.{expert}.linear_fc2.weight",
    megatron_aliases=(_DECODER + "mlp.experts.linear_fc2.weight{expert}",),
    dist_keys=(_DIST + "mlp.experts.experts.linear_fc2.weight",),
    pieces=(Piece(_EXPERT + "w2.weight", lambda c: (c.hidden_size, c.intermediate_size),
                  fused=Fused(_FUSED + "down_proj")),))
FINAL_NORM = WeightRule(
    name="final_layernorm", owner="last",
    megatron="decoder.final_layernorm.weight",
    dist_keys=("decoder.final_layernorm.weight",),
    pieces=(Piece("model.norm.weight", _hidden),))
OUTPUT = WeightRule(
    name="output_layer", owner="last", axis="tp", padded=True, extra_state=True,
    megatron="output_layer.weight",
    dist_keys=("output_layer.weight",),
    pieces=(Piece("lm_head.weight", _vocabulary),))

RULES: tuple[WeightRule, ...] = (
    EMBEDDING, INPUT_NORM, QKV, PROJ, PRE_MLP_NORM, ROUTER, FC1, FC2, FINAL_NORM, OUTPUT)


def dist_names(key: str) -> tuple[str, ...]:
    """The keys, ours first, under which layer specifications of the engine know the tensor of a distributed checkpoint.

    `key` is one of them: of a weight, or of an optimizer's tensor of it (`optimizer.state.exp_avg.` in front).
    """
    for rule in RULES:
        for name in rule.dist_keys:
            if key == name or key.endswith(f".{name}"):
                return tuple(key.removesuffix(name) + other for other in rule.dist_keys)
    return (key,)


# -- Adapters ------------------------------------------------------------------------------------------------

PEFT_PREFIX = "base_model.model."  # of every name in a file of PEFT's


def target(piece: Piece) -> str:
    """The name that `--lora-target-modules` has for a linear."""
    return piece.hf.split(".")[-2]


def _adapter(rule: WeightRule, letter: str, pieces: tuple[Piece, ...], rank: int) -> WeightRule:
    """The rule of the matrices A or B beside the linears of `rule`.

    A linear whose outputs are cut cuts B as itself, with the rank for a width, and every rank has all of A; one whose
    inputs are cut, the last dim, cuts A and has all of B.
    """
    inputs_cut = rule.shard_dim == len(rule.pieces[0].view(MixtralConfig())) - 1

    def view(piece: Piece, config: MixtralConfig) -> Shape:
        *rows, width = piece.view(config)
        if letter == "B":
            return (*rows, rank)
        return (rank, width) if inputs_cut else (1, rank, width)  # those of several pieces stand below each other

    def of_peft(name: str | None) -> str | None:
        return None if name is None else PEFT_PREFIX + name.replace(".weight", f".lora_{letter}.weight")

    def renamed(name: str) -> str:
        return f"lora_{letter}".join(name.rsplit("weight", 1))

    cut = {"axis": rule.axis, "shard_dim": rule.shard_dim, "join_dim": rule.join_dim}
    if inputs_cut and letter == "B":
        cut = {"axis": None, "shard_dim": 0, "join_dim": 0}
    elif not inputs_cut and letter == "A":
        cut = {"axis": None, "shard_dim": 1, "join_dim": 0}
    return WeightRule(
        name=f"{rule.name}_{letter}", owner=rule.owner, dist_keys=(renamed(rule.dist_keys[0]),), **cut,
        megatron=renamed(rule.megatron_aliases[0] if rule.per_expert else rule.megatron),
        pieces=tuple(Piece(of_peft(piece.hf), partial(view, piece), of_peft(piece.alias)) for piece in pieces))


@lru_cache(maxsize=16)
def _adapter_rules(targets: tuple[str, ...], rank: int) -> tuple[WeightRule, ...]:
    found = []
    for rule in RULES:
        pieces = tuple(piece for piece in rule.pieces if rule.owner == "layer" and target(piece) in targets)
        found += [_adapter(rule, letter, pieces, rank) for letter in "AB" if pieces]
    return tuple(found)


def rules_of(config: MixtralConfig) -> tuple[WeightRule, ...]:
    """The ten rules of a Mixtral, or those of the adapters that `config` is of."""
    return _adapter_rules(config.targets, config.rank) if isinstance(config, AdapterConfig) else RULES


# -- Dense relatives ---------------------------------------------------------------------------------------

_LLAMA = {"block_sparse_moe.experts.0.w1": "mlp.gate_proj", "block_sparse_moe.experts.0.w3": "mlp.up_proj",
          "block_sparse_moe.experts.0.w2": "mlp.down_proj"}
# Of each dense model: parts of the names in its Mixtral of one expert -> what stands there in its own.
_DENSE: dict[str, dict[str, str]] = {
    "mistral": _LLAMA, "llama": _LLAMA,
    "internlm2": {"model.embed_tokens": "model.tok_embeddings", "lm_head": "output",
                  "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
                  "self_attn.o_proj": "attention.wo", "block_sparse_moe.experts.0": "feed_forward"},
}
# Where q, k and v are one matrix: group after group its queries, its key, its value, which is the engine's order too.
PACKED_QKV = {"internlm2": _LAYER + "attention.wqkv.weight"}


def dense_name(name: str, model_type: str) -> str:
    """The name that a dense model has for a tensor of its Mixtral of one expert."""
    for ours, theirs in _DENSE[model_type].items():
        name = name.replace(ours, theirs)
    return name


def dense_target(linear: str, model_type: str) -> str:
    """The name that a linear (`target`) has in a dense model."""
    place = "block_sparse_moe.experts.0" if linear in ("w1", "w2", "w3") else "self_attn"
    return dense_name(f"{place}.{linear}", model_type).rpartition(".")[2]


# Tensors that some checkpoints carry and no Mixtral needs: recomputed from the config.
IGNORABLE_HF_SUFFIXES: tuple[str, ...] = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class HFTensor:
    """One Hugging Face tensor of a given architecture: `rule.pieces[piece]` of a layer and expert."""

    name: str
    rule: WeightRule
    piece: int
    layer: int
    expert: int
    view: Shape

    @property
    def shape(self) -> Shape:
        """Its shape on disk."""
        return collapse(self.view)

    def names(self) -> tuple[str, ...]:
        """The names it is accepted under when stored by itself, the canonical one first."""
        alias = self.rule.pieces[self.piece].alias
        return (self.name,) if alias is None else (self.name, alias.format(layer=self.layer, expert=self.expert))

    def fused(self) -> Fused | None:
        """The tensor over all experts that may hold it instead, with its layer's name filled in."""
        fused = self.rule.pieces[self.piece].fused
        return None if fused is None else Fused(fused.name.format(layer=self.layer), fused.part, fused.parts)


def walk(config: MixtralConfig, layers: range, experts: range, first: bool = True,
         last: bool = True) -> Iterator[tuple[WeightRule, int, int]]:
    """Rules in the model's order, each with its layer and expert, for some layers and experts, and the model's ends."""
    rules = rules_of(config)
    yield from ((rule, 0, 0) for rule in rules if first and rule.owner == "first")
    for layer in layers:
        for rule in rules:
            if rule.owner == "layer":
                yield from ((rule, layer, expert) for expert in (experts if rule.per_expert else (0,)))
    yield from ((rule, 0, 0) for rule in rules if last and rule.owner == "last")


def hf_tensors(config: MixtralConfig) -> dict[str, HFTensor]:
    """Every Hugging Face tensor of an architecture by canonical name, in the model's order.

    With tied embeddings there is no `lm_head.weight`: the output layer *is* the embedding.
    """
    return {name: HFTensor(name, rule, index, layer, expert, rule.pieces[index].view(config))
            for rule, layer, expert in walk(config, range(config.num_hidden_layers), range(config.num_local_experts))
            if not (rule is OUTPUT and config.tie_word_embeddings)
            for index, name in enumerate(rule.hf_names(layer, expert))}
