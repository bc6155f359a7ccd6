"""What sources and sinks say to each other, and the one function that puts tensors together.

A source answers by Hugging Face tensor name with fragments: intervals of the tensor along its rule's shard dim, in the
view of `rules.Piece`, as memory-mapped views wherever the format allows it. A sink lists its output files and the
slices in each; `assemble` fills one slice from fragments. So any source feeds any sink.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_mixtral.config import Coord, MixtralConfig
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.plan import TensorSlice
from megatron_mixtral.weights.rules import HFTensor


@dataclass(frozen=True)
class Fragment:
    """Units [start, start + length) along a Hugging Face tensor's shard dim.

    `data` has the piece's view with the shard dim narrowed to `length`; it need not be contiguous. `where` names the
    file (and the tensor in it) for messages.
    """

    start: int
    length: int
    data: torch.Tensor
    where: str


class TensorSource(Protocol):
    """A checkpoint that can be read by Hugging Face tensor name."""

    config: MixtralConfig
    where: Path
    left_behind: list[str]  # what it also holds and no conversion carries (optimizer state), named for the report

    def check(self) -> None:
        """Raise `CheckpointError` unless every expected tensor is there, whole, of its shape, and nothing else is."""

    def dtype(self, tensor: HFTensor) -> torch.dtype:
        """The type a tensor is stored in."""

    def fragments(self, tensor: HFTensor) -> list[Fragment]:
        """Fragments that tile the tensor exactly, sorted by start."""

    def companions(self) -> list[Path]:
        """Tokenizer and generation files that belong to the model."""


@dataclass(frozen=True)
class OutputFile:
    """One file to be written: its path below the target directory and what goes into it.

    `groups` are the state dicts of the file by key: ("model",), or ("model0", "model1", ...) with virtual stages;
    a safetensors file has one, under "".
    """

    path: str
    groups: dict[str, list[TensorSlice]]
    coord: Coord | None = None  # of a rank file

    def tensors(self) -> Iterator[TensorSlice]:
        """All slices of the file."""
        for group in self.groups.values():
            yield from group


class TensorSink(Protocol):
    """A checkpoint that can be written, a file at a time, below a directory that is given its name when it is whole."""

    config: MixtralConfig
    target: Path
    replace: bool  # whether a directory already at `target` is replaced

    def plan(self, dtypes: dict[str, torch.dtype]) -> list[OutputFile]:
        """The files to write; `dtypes` are those to be stored, by Hugging Face name."""

    def write(self, root: Path, file: OutputFile, dtypes: dict[str, torch.dtype],
              tensors: Iterable[tuple[TensorSlice, torch.Tensor]]) -> int:
        """Write one file below `root` from its tensors in order; the bytes of tensor data in it."""

    def finish(self, root: Path, companions: Iterable[Path]) -> None:
        """Write what belongs beside the weight files: configuration, index, tokenizer files."""


def tiled(tensor: HFTensor, fragments: Iterable[Fragment]) -> list[Fragment]:
    """Sort fragments by start; raise `CheckpointError` unless they tile the tensor and agree in dtype and shape."""
    found = sorted(fragments, key=lambda fragment: fragment.start)
    dim, at = tensor.rule.shard_dim, 0
    for fragment in found:
        expected = list(tensor.view)
        expected[dim] = fragment.length
        if list(fragment.data.shape) != expected:
            raise CheckpointError(f"{fragment.where}: {tensor.name} has view {tuple(fragment.data.shape)}, "
                                  f"expected {tuple(expected)}")
        if fragment.data.dtype != found[0].data.dtype:
            raise CheckpointError(f"{fragment.where}: {tensor.name} is {fragment.data.dtype}, "
                                  f"but {found[0].data.dtype} in {found[0].where}")
        if fragment.start != at:
            raise CheckpointError(f"{tensor.name}: units {at} to {fragment.start} of {tensor.view[dim]} are missing or "
                                  f"stored twice before {fragment.where}")
        at += fragment.length
    if at != tensor.view[dim]:
        raise CheckpointError(f"{tensor.name}: {at} of {tensor.view[dim]} units found"
                              + (f", the last in {found[-1].where}" if found else ""))
    return found


def assemble(target: TensorSlice, source: TensorSource, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor that `target` describes, of its stored shape, contiguous, in `dtype` (None: the source's).

    A whole tensor stored in one piece is handed on as the source's own memory-mapped view, without a copy.
    """
    parts = [(span, source.fragments(span[0])) for span in target.piece_spans()]
    kinds = {fragment.data.dtype for _, fragments in parts for fragment in fragments}
    if dtype is None and len(kinds) > 1:
        found = ", ".join(sorted(map(str, kinds)))
        raise CheckpointError(f"{target.name}: its parts are of different types ({found}); give --params-dtype to "
                              "store one")
    dtype = dtype or kinds.pop()
    only = parts[0][1][0]
    if len(parts) == 1 and not target.padding:
        data = _covering(target, parts[0][1])
        if data is not None and data.dtype == dtype and data.is_contiguous():
            return data.reshape(target.shape)
    result = torch.zeros(target.view, dtype=dtype) if target.padding else torch.empty(target.view, dtype=dtype)
    dim, join = target.rule.shard_dim, target.rule.join_dim
    for (_, at, length), fragments in parts:
        # Joined along another dim than the sharded one, so the two narrowings never meet.
        place = result if len(parts) == 1 else result.narrow(join, at, length)
        filled = sum(_copy_overlap(place, target.start, target.length, fragment, dim) for fragment in fragments)
        if filled != target.length - target.padding:
            raise CheckpointError(f"{target.name}: {filled} of {target.length - target.padding} units filled "
                                  f"from {only.where}")
    return result.reshape(target.shape)


def _covering(target: TensorSlice, fragments: list[Fragment]) -> torch.Tensor | None:
    """The part of a single fragment that is the whole target, or None."""
    for fragment in fragments:
        if fragment.start <= target.start and target.start + target.length <= fragment.start + fragment.length:
            return fragment.data.narrow(target.rule.shard_dim, target.start - fragment.start, target.length)
    return None


def _copy_overlap(place: torch.Tensor, start: int, length: int, fragment: Fragment, dim: int) -> int:
    """Copy what of `fragment` lies in [start, start + length); the number of units copied."""
    low, high = max(start, fragment.start), min(start + length, fragment.start + fragment.length)
    if low >= high:
        return 0
    place.narrow(dim, low - start, high - low).copy_(fragment.data.narrow(dim, low - fragment.start, high - low))
    return high - low
