"""Writing the engine's distributed checkpoints (`--ckpt-format torch_dist`), which a run loads in any layout.

    DIR/ITERATION/.metadata  metadata.json  __N_0.distcp       ("release", or that of the run whose state is taken over)

Every tensor is stored whole for each layer (and expert): one chunk of the global tensor, a `torch.save` archive of its
own inside a .distcp file. The engine's reader takes from it what a rank of any layout needs. It is listed under every
key that a layer specification of the engine asks for, though stored once. `dist_source` reads such directories; formats
as there, and what `GPTModel.sharded_state_dict` of megatron-core 0.19 asks for.

What a run keeps beside the weights is taken over from its distributed checkpoint (`RunState`): the optimizer's tensors,
the counters and the arguments, the states of schedule, data and random numbers are copied as they are stored. Every
entry is an archive of its own inside a .distcp file, and says nothing about where it lies. So a run goes on from the
converted checkpoint as from the original.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mixtral.config import TARGET_FLAGS, AdapterConfig, MixtralConfig, ParallelLayout
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.weights.engine_args import release_state
from megatron_mixtral.weights.files import file_layout
from megatron_mixtral.weights.formats.directory import identity_files, iteration_of, name_of
from megatron_mixtral.weights.formats.dist_metadata import (
    COMMON,
    COMMON_FILE,
    METADATA_FILE,
    Contents,
    StoredChunk,
    StoredTensor,
    contents_bytes,
)
from megatron_mixtral.weights.formats.dist_source import STATE_PREFIXES, DistSource, state_names
from megatron_mixtral.weights.plan import TensorSlice, all_plans, padded_vocabulary
from megatron_mixtral.weights.protocols import Output, TensorSource
from megatron_mixtral.weights.rules import EMBEDDING, RULES, Shape, dist_names, hf_tensors
from megatron_mixtral.weights.streaming import payload

CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}  # metadata.json
CONTENT = {"content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}}
FILE_BYTES, MOST_FILES = 1 << 28, 16  # files are written, and can be read, side by side
OPTIMIZER_PREFIXES = ("optimizer.", "chained_")
_BY_LAYER = re.compile(r"decoder\.layers\.\d+\.")


class DistSink:
    """A distributed checkpoint to be written at `target`.

    `layout` matters only for what the stored arguments say and for the padding of the vocabulary, to a multiple of
    `vocab_divisible_by` (None: 1) x tensor parallel size; any layout loads it. With `carry_state`, the state of a
    source's run is taken over, with its arguments and its padding.
    """

    contents = ("model", "adapters")

    def __init__(self, target: str | Path, layout: ParallelLayout | None = None, *,
                 vocab_divisible_by: int | None = None, replace: bool = False, carry_state: bool = True) -> None:
        self.target, self.replace, self.carry_state = Path(target), replace, carry_state
        self.layout, self.divisible_by = layout or ParallelLayout(), vocab_divisible_by

    def plan(self, source: TensorSource, dtypes: dict[str, str]) -> Output:
        """Files of about equal size, each with consecutive tensors of the model; a run's state has its own."""
        config, layout = source.config, self.layout.validate(source.config, TARGET_FLAGS)
        rows = padded_vocabulary(config, layout, self.divisible_by or 1)
        of_a_run = isinstance(source, DistSource) and not isinstance(config, AdapterConfig)
        run = run_state(source) if self.carry_state and of_a_run else NO_RUN
        if run.iteration is not None:
            self._check_unchanged(source, dtypes, run, rows)
        (plan,) = all_plans(config, ParallelLayout(), rows)
        tensors = [(tensor, payload(tensor, source, dtypes, _box(tensor, config)[1])) for tensor in plan.tensors()
                   if run.iteration is None or not tensor.rule.padded]
        folder, written, files = name_of(run.iteration), Contents({}, {}), dict[str, file_layout.FileLayout]()

        def next_path() -> Path:
            return Path(folder, f"__{len(files)}_0.distcp")

        common = None if run.iteration is not None else release_state(
            config, self.layout, rows, self.divisible_by or 1, dtypes, "torch_dist") | CONTENT
        for group in _shares([(one, one[1].size) for one in tensors]):
            files[next_path().as_posix()] = _weights(written, next_path(), group, config, None if files else common)
        for keys in _shares(run.sizes()):
            files[next_path().as_posix()] = _copies(written, next_path(), run.contents, keys)
        beside = {f"{folder}/{METADATA_FILE}": contents_bytes(written),
                  f"{folder}/metadata.json": json.dumps(CONFIG).encode(), **identity_files(config, run.iteration)}
        if run.common_file is not None:
            beside[f"{folder}/{COMMON_FILE}"] = run.common_file.read_bytes()
        return Output(files, beside, carried=tuple(state_names(run.contents)))

    def _check_unchanged(self, source: TensorSource, dtypes: dict[str, str], run: "RunState", rows: int) -> None:
        """Raise `ConfigError` for a cast or a padding that the optimizer's state would not go with."""
        cast = any(dtypes[name] != source.dtype(tensor) for name, tensor in hf_tensors(source.config).items())
        if cast or (self.divisible_by is not None and rows != run.vocab_rows):
            flag = "--params-dtype" if cast else "--make-vocab-size-divisible-by"
            raise ConfigError(f"{flag} changes weights that the optimizer's state of {source.where} belongs to (it has "
                              f"{run.vocab_rows} vocabulary rows); leave the flag out, or give --no-load-optim to "
                              "convert the weights alone")


def _weights(written: Contents, path: Path, tensors: Sequence[tuple[TensorSlice, file_layout.Payload]],
             config: MixtralConfig, common: dict[str, Any] | None) -> file_layout.FileLayout:
    """A .distcp file of weights, with the common state behind them where it is given; noted in `written`."""
    file = file_layout.Joined(path)
    for tensor, one in tensors:
        key = tensor.rule.dist_keys[0]
        offsets, sizes, whole = _box(tensor, config)
        before = written.tensors.get(key, StoredTensor(whole, one.dtype, ()))
        chunk = StoredChunk(offsets, sizes, file.archive(one, file_layout.label_of(key, offsets)))
        written.tensors[key] = replace(before, chunks=(*before.chunks, chunk))
        if tensor.rule.owner == "layer" and tensor.rule.extra_state:
            empty = _extra_state(key, offsets, whole)
            written.objects[empty] = file.archive([None], file_layout.label_of(empty, ()))
    if common is not None:
        written.objects[COMMON] = file.archive([common], file_layout.label_of(COMMON, ()))
    return file.layout()


def _copies(written: Contents, path: Path, state: Contents, keys: Sequence[str]) -> file_layout.FileLayout:
    """A .distcp file of what is taken over: the archives of the source, one behind the other; noted in `written`."""
    file = file_layout.Joined(path)
    for key in keys:
        if key in state.objects:
            written.objects[key] = file.copy(key, state.objects[key])
        else:
            written.tensors[key] = replace(state.tensors[key], chunks=tuple(
                replace(chunk, region=file.copy(key, chunk.region)) for chunk in state.tensors[key].chunks))
    return file.layout()


def _box(tensor: TensorSlice, config: MixtralConfig) -> tuple[Shape, Shape, Shape]:
    """Offsets and sizes of a tensor's chunk in the global tensor, and that one's shape."""
    piece, lead = tensor.pieces[0], list[tuple[int, int]]()
    if tensor.rule.owner == "layer":
        lead.append((piece.layer, config.num_hidden_layers))
    if tensor.rule.per_expert:
        lead.append((piece.expert, config.num_local_experts))
    return ((*(at for at, _ in lead), *(0,) * len(tensor.shape)), (*(1 for _ in lead), *tensor.shape),
            (*(count for _, count in lead), *tensor.shape))


@dataclass(frozen=True)
class RunState:
    """What a run keeps beside the weights, under the keys that it is written with, and the run's iteration.

    Among the tensors are the embedding and the output layer: a run trains the padded rows of its vocabulary, too, and
    goes on with the same losses only if they stay.
    """

    iteration: int | None  # None: there is no run, and nothing is kept
    contents: Contents
    common_file: Path | None  # where older engines put the common state

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding, padding included."""
        return self.contents.tensors[EMBEDDING.dist_keys[0]].size[0]

    def sizes(self) -> list[tuple[str, int]]:
        """Every entry with its bytes."""
        return [*((key, sum(chunk.region.length for chunk in stored.chunks))
                  for key, stored in self.contents.tensors.items()),
                *((key, region.length) for key, region in self.contents.objects.items())]


NO_RUN = RunState(None, Contents({}, {}), None)


def run_state(source: DistSource) -> RunState:
    """What `source` holds beside weights; `NO_RUN` for one without an optimizer, which no run can go on from.

    Raises `CheckpointError` where it cannot be taken over.
    """
    contents = source.contents
    if not any(key.startswith(OPTIMIZER_PREFIXES) for key in contents.keys):
        return NO_RUN
    iteration = iteration_of(source.where.name)
    common_file = source.where / COMMON_FILE
    if iteration is None or (COMMON not in contents.objects and not common_file.is_file()):
        raise CheckpointError(f"{source.where}: holds an optimizer's state, but is not the iter_NNNNNNN of a run with "
                              "its counters; give --no-load-optim to convert the weights alone")
    weights = [key for rule in RULES if rule.padded for key in rule.dist_keys]
    tensors: dict[str, StoredTensor] = {}
    for key, stored in contents.tensors.items():
        if key in weights or key.startswith(STATE_PREFIXES):
            if _BY_LAYER.search(key):
                raise CheckpointError(f"{source.where}: the optimizer's state is stored layer by layer ({key}), the "
                                      "weights will be stored together; give --no-load-optim to convert them alone")
            if tensors.setdefault(dist_names(key)[0], stored) != stored:
                raise CheckpointError(f"{source.where}: {dist_names(key)[0]} is stored twice; give --no-load-optim to "
                                      "convert the weights alone")
    objects = {key: region for key, region in contents.objects.items() if key.startswith(STATE_PREFIXES)}
    return RunState(iteration, Contents(tensors, objects), None if COMMON in objects else common_file)


def _shares(sized: Sequence[tuple[Any, int]]) -> list[list[Any]]:
    """Consecutive things in groups of about equal size: at most `MOST_FILES`, and none without need."""
    share = max(FILE_BYTES, -(-sum(size for _, size in sized) // MOST_FILES))
    groups: dict[int, list[Any]] = {}
    at = 0
    for thing, size in sized:
        groups.setdefault(at // share, []).append(thing)
        at += size
    return list(groups.values())


def _extra_state(key: str, offsets: Shape, whole: Shape) -> str:
    """Key of the (empty) object beside a weight: the engine numbers it by layer and expert."""
    lead = len(whole) - 2
    return (f"{key.removesuffix('weight')}_extra_state/shard_{'.'.join(map(str, offsets[:lead]))}_"
            f"{'.'.join(map(str, whole[:lead]))}")
