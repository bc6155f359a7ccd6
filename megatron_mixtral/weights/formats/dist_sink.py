"""Writing the engine's distributed checkpoints (`--ckpt-format torch_dist`), which a run loads in any layout.

    DIR/latest_checkpointed_iteration.txt        "release", or the iteration of the run whose state is taken over
    DIR/release/.metadata  metadata.json  __N_0.distcp       (iter_NNNNNNN/ with a run's state)
    DIR/mixtral_config.json

Every tensor is stored whole for each layer (and expert): one chunk of the global tensor, a `torch.save` archive of its
own inside a .distcp file. The engine's reader takes from it what a rank of any layout needs. It is listed under every
key that a layer specification of the engine asks for, though stored once. The `.metadata` pickle
names classes of `torch.distributed.checkpoint` without importing them. `dist_ckpt` reads such directories; formats as
there, and what `GPTModel.sharded_state_dict` of megatron-core 0.19 asks for.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_mixtral.config import CONFIG_FILE, TARGET_FLAGS, Coord, MixtralConfig, ParallelLayout
from megatron_mixtral.weights.dtypes import FLOATS
from megatron_mixtral.weights.engine_args import make_args
from megatron_mixtral.weights.files.file_layout import (
    ALIGNMENT,
    Container,
    Copied,
    Placed,
    tensor_reference,
    torch_archive,
)
from megatron_mixtral.weights.files.pickle_writer import Call, Global, dumps
from megatron_mixtral.weights.formats.dist_metadata import COMMON, METADATA_FILE, Region
from megatron_mixtral.weights.formats.dist_source import chunk_label
from megatron_mixtral.weights.formats.rank_sink import RELEASE, main_type
from megatron_mixtral.weights.formats.rank_source import TRACKER
from megatron_mixtral.weights.formats.run_state import RunState
from megatron_mixtral.weights.plan import ShardPlan, TensorSlice, check_complete, padded_vocabulary
from megatron_mixtral.weights.protocols import OutputFile, stored_type
from megatron_mixtral.weights.rules import Shape, dist_names

CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}  # metadata.json
FILE_BYTES, MOST_FILES = 1 << 28, 16  # files are written, and can be read, side by side
_METADATA = "torch.distributed.checkpoint.metadata"


class DistSink:
    """A distributed checkpoint to be written at `target`.

    `layout` matters only for what the stored arguments say and for the padding of the vocabulary; any layout loads it.
    With `run`, the state of the source's run is taken over, with its arguments and its padding.
    """

    def __init__(self, target: str | Path, config: MixtralConfig, layout: ParallelLayout | None = None, *,
                 vocab_divisible_by: int = 1, replace: bool = False, run: RunState | None = None) -> None:
        self.target, self.config, self.replace = Path(target), config, replace
        self.layout = (layout or ParallelLayout()).validate(config, TARGET_FLAGS)
        self.divisible_by = vocab_divisible_by
        self.run = run
        self.carried: tuple[str, ...] = () if run is None else run.names
        self.folder = RELEASE if run is None else f"iter_{run.iteration:07d}"
        self.padded_vocab = padded_vocabulary(config, self.layout, vocab_divisible_by)
        self._tensors: dict[str, Any] = {}  # key -> (global shape, type, [(offsets, sizes)])
        self._regions: list[tuple[str, Shape | None, str, int, int]] = []  # key, offsets, file, offset, length

    def plan(self, dtypes: dict[str, str]) -> list[OutputFile]:
        """Files of about equal size, each with consecutive tensors of the model; a run's state has its own."""
        plan = ShardPlan(self.config, ParallelLayout(), Coord(), padded_vocab=self.padded_vocab)
        check_complete([plan], self.config)
        tensors = [tensor for tensor in plan.tensors() if self.run is None or not tensor.rule.padded]
        weights = _shares([(tensor, tensor.elements * FLOATS[stored_type(tensor, dtypes)].itemsize)
                           for tensor in tensors])
        state = _shares(self.run.sizes() if self.run is not None else [])
        return [OutputFile(f"{self.folder}/__{number}_0.distcp", {"": group}) for number, group in enumerate(weights)] \
            + [OutputFile(f"{self.folder}/__{number}_0.distcp", {}, carried=tuple(group))
               for number, group in enumerate(state, len(weights))]

    def container(self, file: OutputFile, dtypes: dict[str, str]) -> Container:
        """A .distcp file: archives one behind the other; the first file holds the common state, too."""
        if file.carried:
            return self._copies(file)
        parts: list[tuple[int, Container]] = []
        name, at = Path(file.path).name, 0

        def add(key: str, offsets: Shape | None, contents: Any, tensors: Sequence[tuple[TensorSlice, str]]) -> None:
            nonlocal at
            part = torch_archive(contents, tensors, at, chunk_label(key, offsets or ()))
            self._regions.append((key, offsets, name, at, part.size))
            parts.append((at, part))
            at += part.size + -part.size % ALIGNMENT

        for tensor in file.tensors():
            kind = stored_type(tensor, dtypes)
            key, offsets, sizes = self._place(tensor, kind)
            add(key, offsets, tensor_reference(0, kind, sizes), [(tensor, kind)])
            if tensor.rule.owner == "layer" and tensor.rule.extra_state:
                add(_extra_state(key, offsets, self._tensors[key][0]), None, [None], [])
        if name == "__0_0.distcp" and self.run is None:
            add(COMMON, None, [self._common(dtypes)], [])
        return _joined(parts)

    def _copies(self, file: OutputFile) -> Container:
        """A .distcp file of what is taken over: the archives of the source, one behind the other."""
        assert self.run is not None, "only a run's state is taken over"
        copies: list[Copied] = []
        at = 0

        def add(key: str, offsets: Shape | None, region: Region) -> None:
            nonlocal at
            self._regions.append((key, offsets, Path(file.path).name, at, region.length))
            copies.append(Copied(region, at))
            at += region.length + -region.length % ALIGNMENT

        for key in file.carried:
            if key in self.run.objects:
                add(key, None, self.run.objects[key])
                continue
            stored = self.run.tensors[key]
            self._tensors[key] = (stored.size, stored.dtype, [(chunk.offsets, chunk.sizes) for chunk in stored.chunks])
            for chunk in stored.chunks:
                add(key, chunk.offsets, chunk.region)
        return Container(at, (), at, lambda crcs: b"", tuple(copies))

    def _place(self, tensor: TensorSlice, kind: str) -> tuple[str, Shape, Shape]:
        """Key of a tensor, and offsets and sizes of its chunk in the global tensor."""
        rule, piece = tensor.rule, tensor.pieces[0]
        lead: tuple[tuple[int, int], ...] = ()
        if rule.owner == "layer":
            lead += ((piece.layer, self.config.num_hidden_layers),)
        if rule.per_expert:
            lead += ((piece.expert, self.config.num_local_experts),)
        key = rule.dist_keys[0]
        offsets = (*(at for at, _ in lead), *(0,) * len(tensor.shape))
        sizes = (*(1 for _ in lead), *tensor.shape)
        whole = (*(count for _, count in lead), *tensor.shape)
        self._tensors.setdefault(key, (whole, kind, []))[2].append((offsets, sizes))
        return key, offsets, sizes

    def _common(self, dtypes: dict[str, str]) -> dict[str, Any]:
        """What every rank gets: the arguments and the counters of a checkpoint without an optimizer."""
        kind = main_type(dtypes)
        args = make_args(self.config, self.layout, self.padded_vocab, self.divisible_by, kind, ckpt_format="torch_dist")
        return {"args": args, "checkpoint_version": 3.0, "iteration": 0, "num_floating_point_operations_so_far": 0,
                "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}}

    def finish(self, root: Path, companions: Iterable[Path]) -> None:
        """Write the metadata, the configuration, the companion files and, last, the tracker."""
        (root / self.folder / METADATA_FILE).write_bytes(dumps(self._metadata()))
        (root / self.folder / "metadata.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        if self.run is not None and self.run.common_file is not None:
            shutil.copyfile(self.run.common_file, root / self.folder / self.run.common_file.name)
        (root / CONFIG_FILE).write_text(self.config.to_json(), encoding="utf-8")
        for path in companions:
            shutil.copyfile(path, root / path.name)
        (root / TRACKER).write_text(RELEASE if self.run is None else str(self.run.iteration), encoding="utf-8")

    def _metadata(self) -> Call:
        entries: dict[str, Any] = {}
        for key, (whole, kind, chunks) in self._tensors.items():
            properties = Call(Global(_METADATA, "TensorProperties"), (), new=True, state=(
                Global("torch", kind), Call(Global("torch.serialization", "_get_layout"), ("torch.strided",)), False,
                Call(Global(_METADATA, "_MEM_FORMAT_ENCODING"), (0,)), False))
            boxes = [_object("ChunkStorageMetadata", offsets=_size(offsets), sizes=_size(sizes))
                     for offsets, sizes in chunks]
            for name in dist_names(key):
                entries[name] = _object("TensorStorageMetadata", properties=properties, size=_size(whole), chunks=boxes)
        for key, offsets, *_ in self._regions:
            if offsets is None:
                entries[key] = _object("BytesStorageMetadata")
        storage = _Pairs([(
            _object("MetadataIndex", fqn=name, offset=None if offsets is None else _size(offsets), index=None),
            Call(Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"), (), new=True, state={
                "relative_path": file, "offset": at, "length": length, "transform_descriptors": None}))
            for key, offsets, file, at, length in self._regions for name in dist_names(key)])
        return _object("Metadata", state_dict_metadata=entries, planner_data=None, storage_data=storage,
                       storage_meta=None, version="1.0.0")


def _joined(parts: Sequence[tuple[int, Container]]) -> Container:
    """A file of archives of one tensor or none, the first one with one: all bytes go along with the tensor before."""
    placed: list[Placed] = []
    size = 0
    for start, part in parts:
        size = start + part.size
        if part.placed:
            placed.append(replace(part.placed[0], after=partial(_seal, part.placed[0], part)))
        else:
            placed[-1] = replace(placed[-1], after=partial(_append, placed[-1], start, part.end([])))
    return Container(size, tuple(placed), size, lambda crcs: b"")


def _seal(placed: Placed, archive: Container, crc: int) -> bytes:
    """What follows the only tensor of an archive."""
    return placed.after(crc) + archive.end([crc])


def _append(placed: Placed, start: int, data: bytes, crc: int) -> bytes:
    """What follows a tensor, and from byte `start` of the file on `data`."""
    found = placed.after(crc)
    return found + bytes(start - placed.offset - placed.size - len(found)) + data


class _Pairs(dict):
    """A dictionary to be written whose keys cannot be keys here: it only lists its items."""

    def __init__(self, pairs: list[tuple[Any, Any]]) -> None:
        super().__init__()
        self.pairs = pairs

    def items(self) -> Any:
        return self.pairs


def _shares(sized: Sequence[tuple[Any, int]]) -> list[list[Any]]:
    """Consecutive things in groups of about equal size: at most `MOST_FILES`, and none without need."""
    share = max(FILE_BYTES, -(-sum(size for _, size in sized) // MOST_FILES))
    groups: dict[int, list[Any]] = {}
    at = 0
    for thing, size in sized:
        groups.setdefault(at // share, []).append(thing)
        at += size
    return list(groups.values())


def _object(name: str, **state: Any) -> Call:
    return Call(Global(_METADATA, name), (), state or None, new=True)


def _size(shape: Shape) -> Call:
    return Call(Global("torch", "Size"), (tuple(shape),))


def _extra_state(key: str, offsets: Shape, whole: Shape) -> str:
    """Key of the (empty) object beside a weight: the engine numbers it by layer and expert."""
    lead = len(whole) - 2
    return (f"{key.removesuffix('weight')}_extra_state/shard_{'.'.join(map(str, offsets[:lead]))}_"
            f"{'.'.join(map(str, whole[:lead]))}")
