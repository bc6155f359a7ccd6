"""What sources and sinks say to each other.

A source answers by Hugging Face tensor name with fragments: intervals of the tensor along its rule's shard dim, in the
view of `rules.Piece`, as memory-mapped arrays of bit patterns. A sink plans its output files, down to the byte;
`streaming` fills their tensors from fragments. So any source feeds any sink. `assemble` makes one torch tensor.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy

from megatron_mixtral.config import Coord, MixtralConfig
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.dtypes import as_torch, type_name
from megatron_mixtral.weights.plan import TensorSlice
from megatron_mixtral.weights.rules import HFTensor

if TYPE_CHECKING:
    from megatron_mixtral.weights.files.file_layout import Container


@dataclass(frozen=True)
class Fragment:
    """Units [start, start + length) along a Hugging Face tensor's shard dim.

    `data` has the piece's view with the shard dim narrowed to `length`, as bit patterns of type `dtype`; it need not
    be contiguous. `where` names the file (and the tensor in it) for messages.
    """

    start: int
    length: int
    data: numpy.ndarray
    dtype: str
    where: str


class TensorSource(Protocol):
    """A checkpoint that can be read by Hugging Face tensor name."""

    config: MixtralConfig
    where: Path
    left_behind: list[str]  # what it also holds and no conversion carries (optimizer state), named for the report

    def check(self) -> None:
        """Raise `CheckpointError` unless every expected tensor is there, whole, of its shape, and nothing else is."""

    def dtype(self, tensor: HFTensor) -> str:
        """The name of the type a tensor is stored in."""

    def fragments(self, tensor: HFTensor) -> list[Fragment]:
        """Fragments that tile the tensor exactly, sorted by start."""

    def companions(self) -> list[Path]:
        """Tokenizer and generation files that belong to the model."""

    def release(self) -> None:
        """Give mapped pages back to the system."""


@dataclass(frozen=True)
class OutputFile:
    """One file to be written: its path below the target directory and what goes into it.

    `groups` are the state dicts of the file by key: ("model",), or ("model0", "model1", ...) with virtual stages;
    a safetensors file has one, under "".
    """

    path: str
    groups: dict[str, list[TensorSlice]]
    coord: Coord | None = None  # of a rank file
    carried: tuple[str, ...] = ()  # entries of the source that a distributed checkpoint takes over as they are

    def tensors(self) -> Iterator[TensorSlice]:
        """All slices of the file."""
        for group in self.groups.values():
            yield from group


class TensorSink(Protocol):
    """A checkpoint that can be written, a file at a time, below a directory that is given its name when it is whole."""

    config: MixtralConfig
    target: Path
    replace: bool  # whether a directory already at `target` is replaced
    carried: tuple[str, ...]  # what of the source's state beside the weights it takes over

    def plan(self, dtypes: dict[str, str]) -> list[OutputFile]:
        """The files to write; `dtypes` are those to be stored, by Hugging Face name."""

    def container(self, file: OutputFile, dtypes: dict[str, str]) -> "Container":
        """One file laid out."""

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
        if fragment.dtype != found[0].dtype:
            raise CheckpointError(f"{fragment.where}: {tensor.name} is {fragment.dtype}, "
                                  f"but {found[0].dtype} in {found[0].where}")
        if fragment.start != at:
            raise CheckpointError(f"{tensor.name}: units {at} to {fragment.start} of {tensor.view[dim]} are missing or "
                                  f"stored twice before {fragment.where}")
        at += fragment.length
    if at != tensor.view[dim]:
        raise CheckpointError(f"{tensor.name}: {at} of {tensor.view[dim]} units found"
                              + (f", the last in {found[-1].where}" if found else ""))
    return found


def assemble(target: TensorSlice, source: TensorSource, dtype: Any = None) -> Any:
    """The torch tensor that `target` describes, of its stored shape, in `dtype` (None: the source's)."""
    from megatron_mixtral.weights.streaming import blocks

    name = type_name(dtype) or source.dtype(target.pieces[0])
    found = list(blocks(target, source, name))
    return as_torch(numpy.concatenate(found).reshape(target.shape), name)


def stored_type(tensor: TensorSlice, dtypes: dict[str, str]) -> str:
    """The type a slice is to be stored in. Raises `CheckpointError` when its pieces are of different types."""
    kinds = sorted({dtypes[piece.name] for piece in tensor.pieces})
    if len(kinds) > 1:
        raise CheckpointError(f"{tensor.name}: its parts are of different types ({', '.join(kinds)}); give "
                              "--params-dtype to store one")
    return kinds[0]
