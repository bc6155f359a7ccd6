"""`convert(source, sink)`: import, export and resharding are this one function.

The source is checked whole before anything is written, every target element is filled exactly once (`assemble`), and
the target gets its name only when it is complete and on the disk (`staged`).
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.weights.dist_ckpt import METADATA_FILE, DistSource
from megatron_mixtral.weights.fragments import OutputFile, TensorSink, TensorSource, assemble
from megatron_mixtral.weights.hf import INDEX_FILE, SINGLE_FILE, HFSource
from megatron_mixtral.weights.plan import human_size
from megatron_mixtral.weights.rank_dirs import TRACKER, RankDirSource, iteration_directory
from megatron_mixtral.weights.rules import hf_tensors
from megatron_mixtral.weights.staging import refuse_existing, staged

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "float32": torch.float32,
          "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Report:
    """What a conversion did. `tensors` counts stored tensors, copies on several ranks included."""

    source: Path
    target: Path
    tensors: int = 0
    bytes: int = 0
    seconds: float = 0.0
    files: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = (f"{self.source} -> {self.target}: {self.tensors} tensors, {human_size(self.bytes)} in "
                f"{len(self.files)} files, {self.seconds:.1f} s")
        return text + (f"; left behind: {', '.join(self.left_behind)}" if self.left_behind else "")


def convert(source: TensorSource, sink: TensorSink, *, dtype: torch.dtype | None = None,
            companions: Iterable[Path] = (), progress: Callable[[OutputFile, int, int], None] | None = None) -> Report:
    """Write all of `source` through `sink`, cast to `dtype` where one is given; returns the report.

    `companions` are files to copy beside the weights, before those that the source itself has. `progress` is called
    with (file, number, of how many) before each file. Raises `CheckpointError`; then nothing is at the target that
    was not there before.
    """
    started = time.monotonic()
    if source.config != sink.config:
        raise CheckpointError(f"{source.where} and {sink.target}: source and target describe different models")
    refuse_existing(sink.target, sink.replace)
    if _inside(source.where, sink.target) and sink.replace:
        raise CheckpointError(f"{sink.target} holds the source {source.where}; choose another target")
    source.check()
    dtypes = {name: dtype or source.dtype(tensor) for name, tensor in hf_tensors(source.config).items()}
    files = sink.plan(dtypes)
    report = Report(source.where, sink.target, left_behind=list(source.left_behind))
    with staged(sink.target, sink.replace) as root:
        for number, file in enumerate(files, start=1):
            logger.info("writing %s (%d of %d)", file.path, number, len(files))
            if progress is not None:
                progress(file, number, len(files))
            planned = list(file.tensors())
            report.bytes += sink.write(root, file, dtypes, ((t, assemble(t, source, dtype)) for t in planned))
            report.tensors += len(planned)
            report.files.append(file.path)
        sink.finish(root, _unique([*companions, *source.companions()]))
    report.seconds = time.monotonic() - started
    return report


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _unique(paths: Iterable[Path]) -> list[Path]:
    """The first of each file name."""
    found: dict[str, Path] = {}
    for path in paths:
        found.setdefault(path.name, path)
    return list(found.values())


def open_megatron(directory: str | Path, *, compare_copies: bool = True) -> TensorSource:
    """The source for a Megatron checkpoint directory: rank directories or a distributed checkpoint."""
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist or is not a directory")
    _, iteration = iteration_directory(directory)
    if (iteration / METADATA_FILE).exists():
        return DistSource(directory)
    if any(iteration.glob("mp_rank_*")):
        return RankDirSource(directory, compare_copies=compare_copies)
    raise CheckpointError(f"{directory} is not a Megatron checkpoint: no {TRACKER}, no mp_rank_* directories and no "
                          f"{METADATA_FILE}")


def open_source(directory: str | Path, *, compare_copies: bool = True) -> TensorSource:
    """The source for any directory this library reads, by what is in it."""
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist or is not a directory")
    if (directory / INDEX_FILE).exists() or (directory / SINGLE_FILE).exists():
        return HFSource(directory)
    return open_megatron(directory, compare_copies=compare_copies)


def parse_dtype(text: str | None) -> torch.dtype | None:
    """The torch dtype of a `--params-dtype` value. Raises `ConfigError`."""
    if text is None:
        return None
    if text not in DTYPES:
        raise ConfigError(f"--params-dtype {text}: expected one of {', '.join(DTYPES)}")
    return DTYPES[text]
