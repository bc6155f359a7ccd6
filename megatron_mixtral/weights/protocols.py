"""What sources and sinks say to each other.

A source answers by Hugging Face tensor name with fragments: intervals of the tensor along its rule's shard dim, in the
view of `rules.Piece`, as memory-mapped arrays of bit patterns. A sink plans its output files, down to the byte, and
writes nothing itself; `streaming` makes their bytes from fragments. So any source feeds any sink.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy

from megatron_mixtral.config import MixtralConfig
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.files import MappedFiles, file_layout
from megatron_mixtral.weights.plan import check_tiling
from megatron_mixtral.weights.rules import HFTensor, narrowed


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

    signs: ClassVar[tuple[str, ...]]  # patterns of what only a directory of its format has
    config: MixtralConfig
    where: Path
    left_behind: list[str]  # what it also holds and no conversion carries (optimizer state), named for the report
    companions: list[Path]  # tokenizer and generation files that belong to the model
    mapped: MappedFiles  # what it reads from

    def check(self) -> None:
        """Raise `CheckpointError` unless every expected tensor is there, whole, of its shape, and nothing else is."""

    def dtype(self, tensor: HFTensor) -> str:
        """The name of the type a tensor is stored in."""

    def fragments(self, tensor: HFTensor) -> list[Fragment]:
        """Fragments that tile the tensor exactly, sorted by start."""


@dataclass(frozen=True)
class Output:
    """A checkpoint to be written, planned to the byte. Paths are below the target directory, with slashes.

    `beside` are the small files with their contents: configuration, index, metadata, tracker. `carried` names what is
    taken over of the source beside its weights.
    """

    files: dict[str, file_layout.FileLayout]
    beside: dict[str, bytes]
    companions: tuple[Path, ...] = ()  # files to copy, before those of the source
    carried: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the files with weights."""
        return sum(layout.size for layout in self.files.values())


class TensorSink(Protocol):
    """A format in which a checkpoint can be written to a directory, which gets its name when it is whole."""

    contents: ClassVar[tuple[str, ...]] = ("model",)  # what can be written: "model", "adapters"
    target: Path
    replace: bool  # whether a directory already at `target` is replaced

    def plan(self, source: TensorSource, dtypes: dict[str, str]) -> Output:
        """What is to be written of a source; `dtypes` are the types to be stored, by Hugging Face name. Changes
        nothing. Raises `ConfigError` for a layout, a template or an option that does not fit the model.
        """


def narrow(data: numpy.ndarray, dim: int, start: int, length: int) -> numpy.ndarray:
    """The interval [start, start + length) of a dim, as a view."""
    return data[(slice(None),) * dim + (slice(start, start + length),)]


def tiled(tensor: HFTensor, fragments: Iterable[Fragment]) -> list[Fragment]:
    """Sort fragments by start; raise `CheckpointError` unless they tile the tensor and agree in dtype and shape."""
    found = sorted(fragments, key=lambda fragment: fragment.start)
    for fragment in found:
        expected = narrowed(tensor.view, tensor.rule.shard_dim, fragment.length)
        if fragment.data.shape != expected:
            raise CheckpointError(f"{fragment.where}: {tensor.name} has view {fragment.data.shape}, expected "
                                  f"{expected}")
        if fragment.dtype != found[0].dtype:
            raise CheckpointError(f"{fragment.where}: {tensor.name} is {fragment.dtype}, "
                                  f"but {found[0].dtype} in {found[0].where}")
    check_tiling(tensor, ((fragment.start, fragment.length) for fragment in found),
                 f"{tensor.name} in {', '.join(fragment.where for fragment in found) or 'no file'}")
    return found
