"""The two ends of a conversion: `open_source` finds out what a directory is, `open_sink` is told what to make."""

from pathlib import Path

from megatron_mixtral.config import AdapterConfig, MixtralConfig, ParallelLayout
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.weights.adapters import PeftSink, PeftSource
from megatron_mixtral.weights.edits import DenseSource
from megatron_mixtral.weights.formats import (
    DistSink,
    DistSource,
    HFSink,
    HFSource,
    RankDirSink,
    RankDirSource,
    directory,
)
from megatron_mixtral.weights.protocols import TensorSink, TensorSource

FORMATS = ("huggingface", "torch", "torch_dist", "peft")


def open_source(path: str | Path, *, compare_copies: bool = True, base: MixtralConfig | None = None,
                holds: str | None = None) -> TensorSource:
    """The source for any directory this library reads, by what is in it: a model, or adapters. A dense model is one of
    one expert.

    `base` is the Mixtral that a PEFT folder's adapters are of, where it does not say so itself. `compare_copies`
    compares the copies that several ranks of rank directories hold of the same weights. `holds` is what is expected,
    "model" or "adapters", as sinks name it.
    Raises `CheckpointError` or `ConfigError` for a directory that is none, cannot be read, or holds the other.
    """
    path = _directory(path)
    if holds == "model" and _has_signs(path, PeftSource):
        raise ConfigError(_ADAPTERS.format(path))  # its base need not be known for that
    source = _open(path, compare_copies, base)
    has_adapters = isinstance(source.config, AdapterConfig)
    if holds == "model" and has_adapters:
        raise ConfigError(_ADAPTERS.format(path))
    if holds == "adapters" and not has_adapters:
        raise ConfigError(f"{path} holds a whole model, expected adapters: a PEFT folder, or a checkpoint of a run "
                          "with --lora-rank")
    return source


_ADAPTERS = ("{} holds adapters, and no model: give the model that they were trained on in its place, and this as the "
             "adapter (--adapter), or merge the two first (merge-lora)")


def _open(path: Path, compare_copies: bool, base: MixtralConfig | None) -> TensorSource:
    if _has_signs(path, PeftSource):
        return PeftSource(path, base)
    # A config.json without weights is a Hugging Face folder that lacks something: its source says what.
    if _has_signs(path, HFSource) or ((path / "config.json").is_file() and not directory.is_checkpoint(path)):
        config = MixtralConfig.from_hf_dir(path)
        return HFSource(path, config) if config.dense_config is None else DenseSource(path)
    return open_megatron(path, compare_copies=compare_copies)


def open_megatron(path: str | Path, *, compare_copies: bool = True) -> RankDirSource | DistSource:
    """The source for a Megatron checkpoint directory: rank directories or a distributed checkpoint. Raises as above."""
    path = _directory(path)
    _, iteration = directory.iteration_directory(path)
    if _has_signs(iteration, DistSource):
        return DistSource(path)
    if _has_signs(iteration, RankDirSource):
        return RankDirSource(path, compare_copies=compare_copies)
    raise CheckpointError(f"{path} is not a Megatron checkpoint: no {directory.TRACKER}, no mp_rank_* directories and "
                          "no metadata of a distributed one")


def open_sink(path: str | Path, format: str = "huggingface", layout: ParallelLayout | None = None, *,
              replace: bool = False, template: str | Path | None = None, max_shard_size: str = "5GB",
              vocab_divisible_by: int | None = None, carry_state: bool = True,
              adapter_format: str = "per-expert") -> TensorSink:
    """The sink for a directory to be written: "huggingface", "torch" (rank directories) or "torch_dist"; for adapters,
    "peft" in the form `adapter_format`, or "torch_dist".

    `layout` (default: one device) is that of Megatron's formats, and `vocab_divisible_by` their padding; `template` and
    `max_shard_size` are Hugging Face's, see `HFSink`; `carry_state` is of "torch_dist", see `DistSink`. `replace`
    allows a directory that is not empty. Nothing is written before `convert`.
    """
    if format == "huggingface":
        return HFSink(path, template=template, max_shard_size=max_shard_size, replace=replace)
    if format == "torch":
        return RankDirSink(path, layout, vocab_divisible_by=vocab_divisible_by, replace=replace)
    if format == "torch_dist":
        return DistSink(path, layout, vocab_divisible_by=vocab_divisible_by, replace=replace, carry_state=carry_state)
    if format == "peft":
        return PeftSink(path, form=adapter_format, replace=replace)
    raise ConfigError(f"format {format!r}: expected one of {', '.join(FORMATS)}")


def _directory(path: str | Path) -> Path:
    if not Path(path).is_dir():
        directory.iteration_directory(Path(path))  # says what is there instead
    return Path(path)


def _has_signs(directory: Path, source: type[TensorSource]) -> bool:
    return any(any(directory.glob(pattern)) for pattern in source.signs)
