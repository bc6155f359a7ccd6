"""Training data from indexed datasets: blends, splits and the index cache, by the engine's own builders."""

from collections.abc import Callable
from typing import Any

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset

from megatron_mixtral.data.datasets.blend import Blend, prefixes_of
from megatron_mixtral.data.datasets.index_cache import cache_folder
from megatron_mixtral.data.datasets.splits import Samples, Shares, build_splits, parts_of, wanted
from megatron_mixtral.data.indexed import IndexFile
from megatron_mixtral.errors import DataError


def build_pretraining(
    samples: Samples,
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
        blend_per_split = wanted(blend_per_split, samples)
    prefixes = prefixes_of(blend_per_split if blend_per_split is not None else [blend])
    config = GPTDatasetConfig(
        random_seed=seed, sequence_length=seq_length, blend=blend, blend_per_split=blend_per_split, split=split,
        path_to_cache=cache_folder(cache, prefixes), tokenizer=tokenizer, create_attention_mask=False, **options)

    def check(prefix: str, shares: list[Shares]) -> None:
        _check_splits(prefix, shares, split, seq_length)

    has_validation = blend_per_split[1] if blend_per_split is not None else blend is None or config.split_matrix[1]
    if samples[1] and not has_validation:
        source = f"--split {split}" if split else "--valid-data-path"
        raise DataError(f"the run validates, and {source} gives nothing to validate on: give a part "
                        "(--split 990,10,0), or want none with --eval-iters 0")
    for prefix in prefixes if blend_per_split is not None else []:
        check(prefix, [(0.0, 1.0)])
    return build_splits(GPTDataset if prefixes else MockGPTDataset, config, samples, is_built_on_rank, check)


def _check_splits(prefix: str, shares: list[Shares], split: str | None, seq_length: int) -> None:
    """`DataError` for a split too short for one sample; the engine would loop for ever on an empty one."""
    lengths = IndexFile(prefix).lengths
    for name, first, last, hint in parts_of(shares, len(lengths)):
        tokens = int(lengths[first:last].sum(dtype=np.int64))
        if tokens < seq_length + 1:
            share = f" split of --split {split}" if split else " data"
            raise DataError(
                f"{prefix}: its {name}{share} holds {last - first} of {len(lengths)} documents, {tokens} tokens; one "
                f"sample needs {seq_length + 1} (--seq-length + 1): give more text, or another --split{hint}")
