"""Fine-tuning samples from instruction data: rows of ids, shifted labels, masks and the bounds of their samples.

The engine's builder makes blends and splits of `InstructionDataset`, as `pretraining.py` has it do for plain text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset

from megatron_mixtral.data.datasets.blend import Blend
from megatron_mixtral.data.datasets.instruction_files import InstructionFiles
from megatron_mixtral.data.datasets.splits import Samples, Shares, build_splits, parts_of, wanted
from megatron_mixtral.errors import DataError
from megatron_mixtral.tokenizer import chat

PAD = 0  # any id of the vocabulary: it is neither attended to, nor routed into a balancing loss, nor trained


class InstructionDataset(MegatronDataset):
    """Rows of one split of one set, shuffled anew in every epoch.

    Item i is a function of i, the seed and the split alone, so a run goes on from its number of consumed samples.
    """

    _order: tuple[int, np.ndarray] | None = None  # of the epoch that was read last

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: InstructionFiles) -> int:
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: BlendedMegatronDatasetConfig) -> InstructionFiles:
        return InstructionFiles(dataset_path)

    def __len__(self) -> int:
        return len(self.indices) if self.num_samples is None else self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        epoch, place = divmod(index, len(self.indices))
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng((self.config.random_seed, self.index_split.value, epoch))
            self._order = epoch, rng.permutation(self.indices)
        samples = self.dataset.row(int(self._order[1][place]))
        return row_tensors(samples, self.config.sequence_length, self.config.multiple)


@dataclass
class _Config(BlendedMegatronDatasetConfig):
    multiple: int = 1  # to which the positions of each sample are padded


def row_tensors(
    samples: list[tuple[np.ndarray, np.ndarray]], seq_length: int, multiple: int = 1
) -> dict[str, torch.Tensor]:
    """A row of `InstructionFiles` as a training sample. Behind each of its samples stands padding up to a multiple of
    `multiple` positions (context parallelism cuts each into equal chunks), which counts as the sample's.

    `tokens`, `labels` (the next id; 0 where nothing is trained) and `position_ids` (from 0 in every sample), int64,
    `loss_mask` (float32, 1 where the label is trained) and `padding_mask` (bool, True behind a sample), each
    [seq_length]; `cu_seqlens` (int32 [seq_length + 1]): 0 and the end of each sample, then seq_length; `samples`: their
    number, int64 scalar.
    """
    tokens, labels, positions = (np.full(seq_length, fill, dtype=np.int64) for fill in (PAD, chat.IGNORED, 0))
    bounds, padding = np.full(seq_length + 1, seq_length, dtype=np.int32), np.ones(seq_length, dtype=bool)
    bounds[0] = 0
    for number, (ids, targets) in enumerate(samples, start=1):
        start = int(bounds[number - 1])
        end = start + len(ids) - 1
        tokens[start:end], labels[start:end] = ids[:-1], targets[1:]
        positions[start:end] = np.arange(end - start)
        padding[start:end] = False
        bounds[number] = start + -(-(end - start) // multiple) * multiple
    trained = labels != chat.IGNORED
    return {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy(np.where(trained, labels, 0)),
        "loss_mask": torch.from_numpy(trained.astype(np.float32)),
        "position_ids": torch.from_numpy(positions),
        "padding_mask": torch.from_numpy(padding),
        "cu_seqlens": torch.from_numpy(bounds),
        "samples": torch.tensor(len(samples)),
    }


def build_instruction(
    samples: Samples, *, tokenizer: Any, seq_length: int, seed: int, blend: Blend | None,
    blend_per_split: list[Blend | None] | None, split: str | None, cache: str | None,
    is_built_on_rank: Callable[[], bool], multiple: int = 1,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Train, validation and test set (None where none is wanted); `samples` are the numbers wanted of each.

    Sets without weights are blended by their numbers of rows, so that each row is read once an epoch. `DataError` for a
    split without rows.
    """
    if blend_per_split is not None:
        blend_per_split = [_weighted(one) for one in wanted(blend_per_split, samples)]
    config = _Config(
        random_seed=seed, sequence_length=seq_length, blend=_weighted(blend), blend_per_split=blend_per_split,
        split=split, path_to_cache=cache, tokenizer=tokenizer, multiple=multiple)

    def check(prefix: str, shares: list[Shares]) -> None:
        rows = len(InstructionFiles(prefix))
        for name, first, last, hint in parts_of(shares, rows):
            if first == last:
                raise DataError(f"{prefix}: its {name} split of --split {split} holds none of its {rows} rows: give "
                                f"more data, or another --split{hint}")

    return build_splits(InstructionDataset, config, samples, is_built_on_rank, check)


def _weighted(blend: Blend | None) -> Blend | None:
    if blend is None or blend[1] is not None or len(blend[0]) == 1:
        return blend
    return blend[0], [float(len(InstructionFiles(prefix))) for prefix in blend[0]]
