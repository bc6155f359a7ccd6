"""Training data from indexed datasets: blends, splits and the index cache, by the engine's own builders."""

from collections.abc import Callable
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset

from megatron_mixtral.data.datasets.blend import Blend
from megatron_mixtral.data.datasets.index_cache import cache_folder
from megatron_mixtral.data.indexed.reader import IndexFile
from megatron_mixtral.errors import DataError


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
    given = [one for one in (blend_per_split if blend_per_split is not None else [blend]) if one is not None]
    kind = GPTDataset if given else MockGPTDataset
    folder = cache_folder(cache, [prefix for one in given for prefix in one[0]])
    config = GPTDatasetConfig(
        random_seed=seed, sequence_length=seq_length, blend=blend,
        blend_per_split=blend_per_split, split=split, path_to_cache=folder, tokenizer=tokenizer,
        create_attention_mask=False, **options)
    if config.split_matrix is not None:
        config.split_matrix = [part if size != 0 else None
                               for part, size in zip(config.split_matrix, samples, strict=True)]
    has_validation = blend_per_split[1] if blend_per_split is not None else blend is None or config.split_matrix[1]
    if samples[1] and not has_validation:
        source = f"--split {split}" if split else "--valid-data-path"
        raise DataError(f"the run validates, and {source} gives nothing to validate on: give a part "
                        "(--split 990,10,0), or want none with --eval-iters 0")
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
    lengths = IndexFile(prefix).lengths
    for name, part in zip(("training", "validation", "test"), matrix, strict=False):
        if part is None:
            continue
        first, last = (int(round(end * len(lengths))) for end in part)  # as the engine's builder rounds
        tokens = int(lengths[first:last].sum(dtype=np.int64))
        if tokens < seq_length + 1:
            share = f" split of --split {split}" if split else " data"
            hint = "" if name == "training" else ", or want none with --eval-iters 0"
            raise DataError(
                f"{prefix}: its {name}{share} holds {last - first} of {len(lengths)} documents, {tokens} tokens; one "
                f"sample needs {seq_length + 1} (--seq-length + 1): give more text, or another --split{hint}")
