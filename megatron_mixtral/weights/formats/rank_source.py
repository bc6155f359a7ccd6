"""Reading rank directories: the engine's `--ckpt-format torch`, one `model_optim_rng.pt` for each shard.

    DIR/ITERATION/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt      _PPP only with pp > 1, _EEE only with ep > 1

`mp_rank_00_001` may mean pp 1 or ep 1, so the layout is taken from the `args` that every file holds, never guessed.
Names as in `megatron.training.checkpointing.get_checkpoint_name`. `rank_sink` writes such directories.
"""

import re
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy

from megatron_mixtral.config import Coord, ParallelLayout, engine
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.weights.files import MappedFiles, Reader, Stored, load_torch
from megatron_mixtral.weights.formats.directory import companions_of, iteration_directory
from megatron_mixtral.weights.formats.legacy_names import today
from megatron_mixtral.weights.plan import ShardPlan, TensorSlice, all_plans
from megatron_mixtral.weights.protocols import Fragment, TensorSource, narrow, tiled
from megatron_mixtral.weights.rules import EMBEDDING, HFTensor, collapse, narrowed

FILE_NAME = "model_optim_rng.pt"
OPTIMIZER_FILE = "distrib_optim.pt"
LABEL = "megatron_mixtral"  # our own entry in a rank file: the coordinate it belongs to
IGNORABLE_SUFFIXES = ("_extra_state", "rotary_pos_emb.inv_freq")
LEFT_BEHIND = ("optimizer", "opt_param_scheduler", "rng_state", "rerun_state_machine")
COMPARED = 1 << 19  # elements of two copies compared at a time


def rank_name(coord: Coord, pipeline: bool, expert: bool) -> str:
    """The directory of one shard; the engine appends pipeline and expert ranks only where there are several."""
    name = f"mp_rank_{coord.tp:02d}"
    if pipeline:
        name += f"_{coord.pp:03d}"
    return f"{name}_{coord.ep:03d}" if expert else name


def rank_names(layout: ParallelLayout) -> dict[Coord, str]:
    """Directory name of every shard. Raises `ConfigError` where two shards would share one."""
    names = {coord: rank_name(coord, layout.pp > 1, layout.ep > 1) for coord in layout.coords()}
    if len(set(names.values())) != len(names):
        raise ConfigError(f"layout {layout}: {len(names)} shards but {len(set(names.values()))} file names; the engine "
                          "names files by tensor, pipeline and expert rank only, so expert tensor parallelism "
                          f"(etp {layout.etp}) must not exceed tensor parallelism (tp {layout.tp}) here")
    return names


class RankDirSource(TensorSource):
    """A checkpoint in rank directories, of any layout that `ParallelLayout` can say.

    `compare_copies` compares every tensor that several ranks hold (norms, the router, dense weights under expert
    parallelism) and refuses contradicting copies. Raises `CheckpointError`.
    """

    signs = ("mp_rank_*",)

    def __init__(self, directory: str | Path, *, compare_copies: bool = True) -> None:
        self.root, self.where = iteration_directory(Path(directory))
        self.compare_copies = compare_copies
        self.companions, self.mapped = companions_of(self.root), MappedFiles()
        first = self._first_file()
        contents = self._load(first)
        args = contents.get("args")
        if args is None:
            raise CheckpointError(f"{first}: has no args, so its layout is not known")
        self.args, self.layout = args, engine.layout_from_args(args, str(first))
        self.config = engine.config_of_checkpoint(self.root, args, str(first))
        try:
            self.layout.validate(self.config)
            self._names = rank_names(self.layout)
        except ConfigError as error:
            raise CheckpointError(f"{first}: the layout in its args does not fit the model: {error}") from None
        self._stored: dict[str, dict[tuple[int, int], list[Fragment]]] = {}  # by name and interval, of each rank
        self._compared: set[str] = set()
        self.padded_vocab = self._padded_vocab(contents, first)
        self.left_behind = [key for key in LEFT_BEHIND if key in contents]
        if (first.parent / OPTIMIZER_FILE).exists():
            self.left_behind.append(OPTIMIZER_FILE)

    def _first_file(self) -> Path:
        found = [self.where / rank_name(Coord(), pipeline, expert) / FILE_NAME
                 for pipeline in (False, True) for expert in (False, True)]
        for path in found:
            if path.is_file():
                return path
        raise CheckpointError(f"{self.where}: no shard of rank 0; looked for {FILE_NAME} in "
                              f"{', '.join(path.parent.name for path in found)}")

    def file(self, coord: Coord) -> Path:
        """The file of a shard. Raises `CheckpointError` where there is none."""
        path = self.where / self._names[coord] / FILE_NAME
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though the layout of the checkpoint needs it")
        return path

    def _load(self, path: Path) -> dict[str, Any]:
        contents = load_torch(self.mapped[path], str(path))
        if not isinstance(contents, dict):
            raise CheckpointError(f"{path}: expected a dictionary, found {type(contents).__name__}")
        return contents

    def _padded_vocab(self, contents: dict[str, Any], first: Path) -> int:
        name = EMBEDDING.megatron
        weight = self._model(contents, 0, first).get(name)
        if not isinstance(weight, Stored) or len(weight.shape) != 2:
            raise CheckpointError(f"{first}: {name} is missing")
        rows = weight.shape[0] * self.layout.tp
        if rows < self.config.vocab_size:
            raise CheckpointError(f"{first}: {name} has {weight.shape[0]} rows, x tp {self.layout.tp} = {rows}, fewer "
                                  f"than the vocabulary of {self.config.vocab_size}")
        return rows

    def _model(self, contents: dict[str, Any], chunk: int, path: Path) -> dict[str, Any]:
        """The state dict of a model chunk, under the names of the local specification."""
        key = f"model{chunk}" if self.layout.vpp > 1 else "model"
        if not isinstance(contents.get(key), dict):
            raise CheckpointError(f"{path}: has no {key}")
        experts = self.config.num_local_experts // self.layout.ep
        return today(contents[key], experts, contents.get("checkpoint_version"), str(path))

    # -- What is there -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Open every file and raise `CheckpointError` for anything missing, left over, misplaced or misshapen."""
        present = {path.name for path in self.where.iterdir() if re.fullmatch(r"mp_rank_[\d_]+", path.name)}
        extra = sorted(present - set(self._names.values()))
        if extra:
            raise CheckpointError(f"{self.where / extra[0]}: does not belong to layout {self.layout} of the checkpoint")
        self._stored.clear()
        for plan in all_plans(self.config, self.layout, self.padded_vocab):
            path = self.file(plan.coord)
            if plan.chunk == 0:
                contents = self._load(path)
                self._check_label(contents, plan.coord, path)
            self._take(plan, self._model(contents, plan.chunk, path), path)

    def _check_label(self, contents: dict[str, Any], coord: Coord, path: Path) -> None:
        """A shard under another shard's name loads without complaint, so each of ours says which it is."""
        label = contents.get(LABEL)
        if label is not None and label != asdict(coord):
            raise CheckpointError(f"{path}: is the shard of {label}, expected {asdict(coord)}; were files swapped?")
        args = contents.get("args")
        layout = self.layout if args is None else engine.layout_from_args(args, str(path))
        if layout != self.layout:
            raise CheckpointError(f"{path}: is of layout {layout}, the others of {self.layout}")

    def _take(self, plan: ShardPlan, group: dict[str, Any], path: Path) -> None:
        """Index the tensors of one model chunk by Hugging Face name; each of them must be planned, and be there."""
        left = {name for name in group if not name.endswith(IGNORABLE_SUFFIXES)}
        for planned in plan.tensors():
            name = next((n for n in (planned.name, *planned.aliases) if n in group), None)
            if name is None:
                raise CheckpointError(f"{path}: {planned.name} is missing")
            left.discard(name)
            parts = group[name] if isinstance(group[name], tuple) else (group[name],)
            views = [planned.view] if len(parts) == 1 else [
                narrowed(piece.view, planned.rule.shard_dim, planned.length) for piece in planned.pieces]
            pieces = []
            for stored, view in zip(parts, views, strict=True):
                shape = collapse(view)
                if not isinstance(stored, Stored) or stored.shape != shape:
                    found = stored.shape if isinstance(stored, Stored) else type(stored).__name__
                    raise CheckpointError(f"{path}: {name} has shape {found}, expected {shape} in layout {self.layout}")
                if stored.data is None:
                    raise CheckpointError(f"{path}: {name} is {stored.dtype}, expected floating point weights")
                pieces.append((stored.dtype, stored.data.reshape(view)))
            if len(parts) < len(planned.pieces):
                (dtype, joined), dim = pieces[0], planned.rule.join_dim
                ends = list(accumulate(piece.view[dim] for piece in planned.pieces))
                pieces = [(dtype, data) for data in numpy.split(joined, ends[:-1], dim)]
            self._index(planned, pieces, f"{path} ({name})")
        if left:
            raise CheckpointError(f"{path}: {len(left)} tensors that this shard does not have, first {min(left)}")

    def _index(self, planned: TensorSlice, pieces: list[tuple[str, numpy.ndarray]], where: str) -> None:
        """Note the pieces of a tensor, each with its type."""
        length = planned.length - planned.padding
        for piece, (dtype, data) in zip(planned.pieces, pieces, strict=True):
            if length > 0:
                copies = self._stored.setdefault(piece.name, {}).setdefault((planned.start, length), [])
                copies.append(Fragment(planned.start, length, narrow(data, planned.rule.shard_dim, 0, length), dtype,
                                       where))

    # -- Reading -----------------------------------------------------------------------------------------

    def dtype(self, tensor: HFTensor) -> str:
        """The name of the type a tensor is stored in (of its first fragment)."""
        return next(iter(self._intervals(tensor).values()))[0].dtype

    def _intervals(self, tensor: HFTensor) -> dict[tuple[int, int], list[Fragment]]:
        if not self._stored:
            self.check()
        return self._stored[tensor.name]

    def fragments(self, tensor: HFTensor) -> list[Fragment]:
        """One memory-mapped fragment for each tensor-parallel shard."""
        found = []
        for one, *others in self._intervals(tensor).values():
            if self.compare_copies and tensor.name not in self._compared:
                for other in others:
                    with Reader(summed=False) as reader:  # what equals the first is as whole as it
                        same = one.dtype == other.dtype and same_bits(one.data, other.data, reader)
                    if not same:
                        raise CheckpointError(f"{tensor.name}: {one.where} and {other.where} hold different values of "
                                              "the same weights")
            found.append(one)
        self._compared.add(tensor.name)
        return tiled(tensor, found)


def same_bits(one: numpy.ndarray, other: numpy.ndarray, reader: Reader) -> bool:
    """Whether two arrays of bit patterns are the same: a NaN equals itself. In parts, to need little memory."""
    if one.size <= COMPARED:
        return numpy.array_equal(reader.fetch(one), reader.fetch(other))
    if len(one) == 1:
        return same_bits(one[0], other[0], reader)
    half = len(one) // 2
    return same_bits(one[:half], other[:half], reader) and same_bits(one[half:], other[half:], reader)
