"""Training, validation and test set of a run: what both kinds of data have in common."""

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig

Samples = tuple[int | None, int | None, int | None]
Shares = tuple[float, float] | None  # the ends of a split as shares of the documents; None where nothing is wanted


def wanted[T](splits: Sequence[T | None], samples: Samples) -> list[T | None]:
    """`splits` without those of which no sample is wanted: the engine would look for one in an empty split for ever."""
    return [one if size != 0 else None for one, size in zip(splits, samples, strict=True)]


def build_splits(
    kind: type, config: BlendedMegatronDatasetConfig, samples: Samples, is_built_on_rank: Callable[[], bool],
    check: Callable[[str, list[Shares]], None],
) -> tuple[Any, Any, Any]:  # fmt: skip
    """The three sets; None where none is wanted, and where this rank needs none. `check` is asked for each data set
    that is split.
    """
    if config.split_matrix is not None:
        config.split_matrix = wanted(config.split_matrix, samples)
    for prefix in config.blend[0] if config.blend is not None else []:
        check(prefix, config.split_matrix)
    return BlendedMegatronDatasetBuilder(kind, list(samples), is_built_on_rank, config).build()


def parts_of(shares: Sequence[Shares], count: int) -> list[tuple[str, int, int, str]]:
    """Of each split that is wanted: its name, its documents of `count` (first, behind the last), and how to go on
    without it.
    """
    hint = ", or want none with --eval-iters 0"
    return [
        (name, *(int(round(end * count)) for end in share), "" if name == "training" else hint)  # as the engine rounds
        for name, share in zip(("training", "validation", "test"), shares, strict=False) if share is not None
    ]
