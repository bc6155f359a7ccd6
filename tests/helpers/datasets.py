"""Small indexed datasets, and the samples that a training run reads from them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_mixtral.data.datasets.instruction_files import IDS, LABELS
from megatron_mixtral.data.indexed import IndexedWriter


def write_dataset(prefix: Path, *, vocab_size: int, documents: int = 200, seed: int = 0, end: int | None = None) -> str:
    """Random documents of 20 to 120 tokens with some structure to learn: each token depends on the one before. The last
    one is `end`, if given.
    """
    rng = np.random.default_rng(seed)
    scratch = prefix.with_name(prefix.name + ".scratch")
    scratch.mkdir(parents=True)
    writer = IndexedWriter(prefix, np.dtype(np.uint16), scratch)
    for length in rng.integers(20, 120, documents):
        ids = (3 + (7 * np.arange(length) + rng.integers(0, 5, length) + rng.integers(vocab_size)) % (vocab_size - 3))
        if end is not None:
            ids[-1] = end
        writer.add(ids.astype(np.uint16), np.array([length], dtype=np.int32))
    writer.finish()
    writer.publish()
    writer.close()
    return str(prefix)


def write_rows(prefix: Path, rows: list[list[tuple[list[int], list[int]]]]) -> str:
    """Instruction data: rows of samples, each (ids, labels)."""
    for ending, part in ((IDS, 0), (LABELS, 1)):
        scratch = prefix.with_name(f"{prefix.name}{ending}.scratch")
        scratch.mkdir(parents=True)
        writer = IndexedWriter(f"{prefix}{ending}", np.dtype(np.int32), scratch, splits=True)
        for row in rows:
            values = [np.array(sample[part], dtype=np.int32) for sample in row]
            writer.add(np.concatenate(values), np.array([one.size for one in values], dtype=np.int32),
                       np.array([len(row)], dtype=np.int32))
        writer.finish()
        writer.publish()
        writer.close()
    return str(prefix)


def numbered_dataset(prefix: Path, first: int, count: int) -> str:
    """Documents of 40 tokens, all of one document its number: the tokens of a sample say which documents it reads."""
    scratch = prefix.with_name(prefix.name + ".scratch")
    scratch.mkdir(parents=True)
    writer = IndexedWriter(prefix, np.dtype(np.uint16), scratch)
    for number in range(first, first + count):
        writer.add(np.full(40, number, dtype=np.uint16), np.array([40], dtype=np.int32))
    writer.finish()
    writer.publish()
    writer.close()
    return str(prefix)


def numbered_rows(prefix: Path, first: int, count: int) -> str:
    """Instruction data: rows of one sample of three ids, of which the second is the row's number."""
    ids = [[1, number, 2] for number in range(first, first + count)]
    return write_rows(prefix, [[(one, [-100, *one[1:]])] for one in ids])


def samples(rank: int, prefix: str, cache: str, seq_length: int, wanted: tuple[int, int, int], count: int,
            seed: int = 1234) -> torch.Tensor:
    """The first `count` training samples [count, seq_length + 1] in the order in which a run reads them."""
    from megatron.core.tokenizers import MegatronTokenizer

    from megatron_mixtral.data.datasets import build_pretraining

    tokenizer: Any = MegatronTokenizer.from_pretrained(metadata_path={"library": "null-text"}, vocab_size=96)
    train, _, _ = build_pretraining(
        wanted, tokenizer=tokenizer, seq_length=seq_length, seed=seed, blend=([prefix], None), blend_per_split=None,
        split="969, 30, 1", cache=cache, is_built_on_rank=lambda: True, reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False)
    rows = [train[index] for index in range(count)]
    return torch.stack([torch.cat((row["tokens"], row["labels"][-1:])) for row in rows])
