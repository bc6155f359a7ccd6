"""Training data from indexed datasets: blends, splits and the index cache, by the engine's own builders."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import get_blend_from_list

from megatron_mixtral.errors import DataError

logger = logging.getLogger(__name__)

Blend = tuple[list[str], list[float] | None]


def blend_of(words: list[str] | None) -> Blend | None:
    """`--data-path` as (prefixes, weights or None). Accepts `0.6 A 0.4 B`, or `A B`; checks that every pair of files
    is there: `DataError`.
    """
    if not words:
        return None
    blend = get_blend_from_list(list(words))
    assert blend is not None
    prefixes, weights = blend
    for prefix in prefixes:
        for suffix in (".bin", ".idx"):
            if not Path(prefix + suffix).is_file():
                hint = ""
                if Path(f"{prefix}_text_document.idx").is_file():
                    hint = f"; did you mean {prefix}_text_document?"
                raise DataError(
                    f"--data-path: {prefix}{suffix} does not exist (a data set is named by its prefix, "
                    f"without .bin or .idx){hint}"
                )
    if weights is not None and any(weight < 0 for weight in weights):
        raise DataError(f"--data-path: negative weight in {weights}")
    return prefixes, weights


def check_vocabulary(prefixes: list[str], vocab_size: int, documents: int = 64) -> None:
    """`DataError` if a data set's first documents hold a token the model has no row for."""
    for prefix in prefixes:
        dataset = IndexedDataset(prefix)
        for index in range(min(documents, len(dataset))):
            tokens = dataset[index]
            if len(tokens) and int(tokens.max()) >= vocab_size:
                raise DataError(
                    f"{prefix}: document {index} holds token {int(tokens.max())}, the model's vocabulary "
                    f"has {vocab_size}; it was written with another tokenizer"
                )


def build(
    samples: tuple[int | None, int | None, int | None],
    *,
    tokenizer: Any,
    seq_length: int,
    seed: int,
    blend: Blend | None,
    blend_per_split: list[Blend | None] | None,
    split: str | None,
    cache: str | None,
    is_built_on_rank: Callable[[], bool],
    **options: Any,
) -> tuple[Any, Any, Any]:
    """Train, validation and test set (None where a rank needs none, or a split is empty).

    `samples` are the numbers wanted of each; with neither `blend` nor `blend_per_split` mock data are made.
    A sample is a dict of `tokens`, `labels`, `loss_mask`, `position_ids`, each [seq_length]. `options` are further
    `GPTDatasetConfig` fields.
    """
    if blend_per_split is not None:
        # A split of which no sample is wanted is not built: the engine would look for one in it for ever.
        blend_per_split = [one if size != 0 else None for one, size in zip(blend_per_split, samples, strict=True)]
    given = blend_per_split if blend_per_split is not None else [blend]
    kind = GPTDataset if any(given) else MockGPTDataset
    config = GPTDatasetConfig(
        random_seed=seed, sequence_length=seq_length, blend=blend,
        blend_per_split=blend_per_split, split=split, path_to_cache=cache, tokenizer=tokenizer,
        create_attention_mask=False, **options)
    if config.split_matrix is not None:
        config.split_matrix = [part if size != 0 else None
                               for part, size in zip(config.split_matrix, samples, strict=True)]
    if blend is not None:
        for prefix in blend[0]:
            _check_splits(prefix, config.split_matrix, split, seq_length)
    for one in blend_per_split or []:
        for prefix in one[0] if one is not None else []:
            _check_splits(prefix, [(0.0, 1.0)], None, seq_length)
    return BlendedMegatronDatasetBuilder(kind, list(samples), is_built_on_rank, config).build()


def _check_splits(prefix: str, matrix: list[tuple[float, float] | None], split: str | None, seq_length: int) -> None:
    """`DataError` for a split too short for one sample; the engine would loop for ever on an empty one.

    `matrix` holds the ends of each split as shares of the documents, None where nothing is wanted of it.
    """
    dataset = IndexedDataset(prefix)  # a name: its arrays are views of a map that ends with it
    lengths = dataset.sequence_lengths
    for name, part in zip(("training", "validation", "test"), matrix, strict=False):
        if part is None:
            continue
        first, last = (int(round(end * len(lengths))) for end in part)  # as the engine's builder rounds
        tokens = int(lengths[first:last].sum())
        if tokens < seq_length + 1:
            share = f" split of --split {split}" if split else " data"
            hint = "" if name == "training" else ", or want none with --eval-iters 0"
            raise DataError(
                f"{prefix}: its {name}{share} holds {last - first} of {len(lengths)} documents, {tokens} tokens; one "
                f"sample needs {seq_length + 1} (--seq-length + 1): give more text, or another --split{hint}")
