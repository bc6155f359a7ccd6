"""Reading the engine's distributed checkpoints (`--ckpt-format torch_dist`), whatever layout saved them.

    DIR/ITERATION/.metadata  __R_N.distcp  metadata.json

Tensors are stored as boxes ("chunks") of global tensors that have the layers, and for experts the experts, as leading
dims. A chunk is a small `torch.save` archive inside a .distcp file; its bytes are memory-mapped where they lie.
What a run keeps beside the weights is named by `left_behind`; `dist_sink` takes it over.
Format: `torch.distributed.checkpoint` and `megatron.core.dist_checkpointing` of the pinned versions.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy

from megatron_mixtral.config import AdapterConfig, MixtralConfig, engine
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.dtypes import FLOATS
from megatron_mixtral.weights.files import MappedFiles, Stored, file_layout, load_torch
from megatron_mixtral.weights.formats.directory import companions_of, iteration_directory
from megatron_mixtral.weights.formats.dist_metadata import METADATA_FILE, Contents, StoredTensor, read_contents
from megatron_mixtral.weights.formats.saved_args import common_state
from megatron_mixtral.weights.plan import check_tiling
from megatron_mixtral.weights.protocols import Fragment, TensorSource, tiled
from megatron_mixtral.weights.rules import HFTensor, Shape, WeightRule, collapse, hf_tensors

STATE_PREFIXES = ("optimizer.", "chained_", "rng_state", "rerun_state_machine", "opt_param_scheduler", "common_state")
_LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Span:
    """What one chunk holds of one piece: units [start, start + length) of its shard dim.

    They are `part` of the chunk seen as `view`.
    """

    piece: int
    start: int
    length: int
    view: Shape
    part: tuple[slice, ...]


@dataclass(frozen=True)
class _Place:
    """A `Span` and the chunk's tensor it is in; `lead` indexes the leading layer and expert dims."""

    key: str
    chunk: int
    lead: tuple[int, ...]
    span: Span


def spans(rule: WeightRule, config: MixtralConfig, offset: Shape, sizes: Shape) -> list[Span] | None:
    """The parts of a rule's pieces in a box of its stored (joined, collapsed) tensor; None if it cannot be split so.

    The engine cuts along the shard dim only: whole query groups for qkv, rows within gate or up for fc1.
    """
    view = rule.joined_view(config)
    units = rule.shard_size(config)
    if len(view) < 3:  # stored as it is viewed
        dim = rule.shard_dim
        if any((o, s) != (0, n) for d, (o, s, n) in enumerate(zip(offset, sizes, view, strict=True)) if d != dim):
            return None
        length = min(sizes[dim], units - offset[dim])  # padded rows beyond the vocabulary are dropped
        return [Span(0, offset[dim], length, sizes, (*[slice(None)] * dim, slice(length)))] if length > 0 else []
    if (offset[1], sizes[1]) != (0, view[2]):
        return None
    row, rows, width = offset[0], sizes[0], view[1]
    if rule.shard_dim == 0:
        if row % width or rows % width:
            return None
        found, at = [], 0
        for index, piece in enumerate(rule.pieces):
            end = at + piece.view(config)[rule.join_dim]
            found.append(Span(index, row // width, rows // width, (rows // width, *view[1:]),
                              (slice(None), slice(at, end))))
            at = end
        return found
    found = []
    for index in range(len(rule.pieces)):  # pieces one below the other, `width` rows each
        low, high = max(row, index * width), min(row + rows, (index + 1) * width)
        if low < high:
            found.append(Span(index, low - index * width, high - low, (1, rows, view[2]),
                              (slice(None), slice(low - row, high - row))))
    return found


def state_names(contents: Contents) -> list[str]:
    """What is there beside weights, for a report: "optimizer.state.exp_avg" rather than each of its tensors."""
    found = set()
    for key in contents.keys:
        if key.startswith(STATE_PREFIXES) and not key.startswith("common_state"):
            parts = key.split("/")[0].split(".")
            model = [parts.index(part) for part in ("embedding", "decoder", "output_layer") if part in parts]
            found.add(".".join(parts[:min(model, default=4)]))
    return sorted(found)


class DistSource(TensorSource):
    """A distributed checkpoint. Raises `CheckpointError` naming tensor and file."""

    signs = (METADATA_FILE,)

    def __init__(self, directory: str | Path) -> None:
        self.root, self.where = iteration_directory(Path(directory))
        self.contents = read_contents(self.where)
        self.companions, self.mapped = companions_of(self.root), MappedFiles()
        self._chunks: dict[tuple[str, int], numpy.ndarray] = {}
        common, where = common_state(self.where, self.contents)
        self.args = common.get("args")
        config = engine.config_of_checkpoint(self.root, self.args, where)
        self.config = AdapterConfig.from_args(config, self.args)
        self._places: dict[str, list[_Place]] = {}
        self.left_behind = state_names(self.contents)

    # -- What is there -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `CheckpointError` for tensors that are missing, left over, misshapen or not stored completely."""
        if self._places:
            return
        places: dict[str, list[_Place]] = {name: [] for name in hf_tensors(self.config)}
        used: set[str] = set()
        for rule in dict.fromkeys(tensor.rule for tensor in hf_tensors(self.config).values()):
            used.update(rule.dist_keys)
            for key, layers in self._keys_of(rule).items():
                used.add(key)
                self._index(rule, key, layers, places)
        for name, tensor in hf_tensors(self.config).items():
            check_tiling(tensor, ((place.span.start, place.span.length) for place in places[name]),
                         f"{self.where / METADATA_FILE}: {name}")
        self._check_left_over(used)
        self._places = places

    def _keys_of(self, rule: WeightRule) -> dict[str, int | None]:
        """Keys that hold a rule's tensors, each with its layer, or None where layers are a leading dim (or absent)."""
        stacked = [key for key in rule.dist_keys if key in self.contents.tensors]
        if len({self.contents.tensors[key] for key in stacked}) > 1:  # two names of the same bytes are one tensor
            raise CheckpointError(f"{self.where}: {rule.name} is stored twice, as {' and '.join(stacked)}")
        if stacked:
            return {stacked[0]: None}
        found: dict[str, int | None] = {}
        # Models of unlike layers are stored layer by layer.
        for layer in range(self.config.num_hidden_layers if rule.owner == "layer" else 1):
            single = [key.replace(_LAYERS, f"{_LAYERS}{layer}.", 1) for key in rule.dist_keys]
            key = next((key for key in single if key in self.contents.tensors), None)
            if key is None:
                raise CheckpointError(f"{self.where / METADATA_FILE}: {rule.dist_keys[0]} is missing")
            found[key] = layer
        return found

    def _index(self, rule: WeightRule, key: str, layer: int | None, places: dict[str, list[_Place]]) -> None:
        """Note where the chunks of one stored tensor put which pieces."""
        stored = self.contents.tensors[key]
        lead = self._leading(rule, key, layer, stored)
        for number, chunk in enumerate(stored.chunks):
            found = spans(rule, self.config, chunk.offsets[lead:], chunk.sizes[lead:])
            if found is None:
                raise CheckpointError(f"{chunk.region.file}: {key} has a chunk of {chunk.sizes} at {chunk.offsets}, "
                                      "which no tensor-parallel split of it gives")
            for at in itertools.product(*map(range, chunk.sizes[:lead])):
                numbers = [offset + index for offset, index in zip(chunk.offsets[:lead], at, strict=True)]
                if layer is not None:
                    numbers.insert(0, layer)
                names = rule.hf_names(numbers[0] if numbers else 0, numbers[1] if len(numbers) > 1 else 0)
                for span in found:
                    places[names[span.piece]].append(_Place(key, number, at, span))

    def _leading(self, rule: WeightRule, key: str, layer: int | None, stored: StoredTensor) -> int:
        """How many leading dims count layers and experts; the global shape is checked on the way."""
        lead: Shape = (self.config.num_hidden_layers,) if rule.owner == "layer" and layer is None else ()
        lead += (self.config.num_local_experts,) if rule.per_expert else ()
        expected = (*lead, *collapse(rule.joined_view(self.config)))
        found = stored.size
        padded = rule.padded and len(found) == 2 and found[0] >= expected[0] and found[1] == expected[1]
        if found != expected and not padded:
            raise CheckpointError(f"{self.where / METADATA_FILE}: {key} has shape {found}, expected {expected}")
        if stored.dtype not in FLOATS:
            raise CheckpointError(f"{self.where / METADATA_FILE}: {key} is {stored.dtype}, expected floating "
                                  "point weights")
        return len(lead)

    def _check_left_over(self, used: set[str]) -> None:
        extra = [key for key in self.contents.keys
                 if key not in used and "_extra_state" not in key and not key.startswith(STATE_PREFIXES)]
        if extra:
            raise CheckpointError(f"{self.where / METADATA_FILE}: {len(extra)} entries that a Mixtral does not have, "
                                  f"first {min(extra)}")

    # -- Reading -----------------------------------------------------------------------------------------

    def dtype(self, tensor: HFTensor) -> str:
        self.check()
        return self.contents.tensors[self._places[tensor.name][0].key].dtype

    def fragments(self, tensor: HFTensor) -> list[Fragment]:
        """One memory-mapped fragment for each stored chunk."""
        self.check()
        found = []
        for place in self._places[tensor.name]:
            span, stored = place.span, self.contents.tensors[place.key]
            data = self._read(place.key, place.chunk)[place.lead].reshape(span.view)[span.part]
            where = stored.chunks[place.chunk].region.file
            found.append(Fragment(span.start, span.length, data, stored.dtype, f"{where} ({place.key})"))
        return tiled(tensor, found)

    def _read(self, key: str, number: int) -> numpy.ndarray:
        """One chunk over the mapped file. Its archive is checked against the metadata."""
        if (key, number) not in self._chunks:
            stored = self.contents.tensors[key]
            chunk = stored.chunks[number]
            where = f"{chunk.region.file} ({key} at {chunk.offsets})"
            found = load_torch(self.mapped[chunk.region.file], where, chunk.region.offset, chunk.region.length,
                               file_layout.label_of(key, chunk.offsets))
            if not isinstance(found, Stored) or found.data is None or found.shape != chunk.sizes \
                    or found.dtype != stored.dtype or not found.data.flags.c_contiguous:
                raise CheckpointError(f"{where}: is not the {stored.dtype} tensor of {chunk.sizes} that the metadata "
                                      "says")
            self._chunks[key, number] = found.data
        return self._chunks[key, number]
