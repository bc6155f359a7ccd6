"""Instruction datasets as training sees them: `{prefix}_packed_input_ids_document` and `..._labels_document`.

numpy alone, so that training can ask before the engine is imported; `instruction.py` reads rows from it. The format is
in `data/instruction/run.py`. The third dataset of a set, its attention mask, is all ones and is not read.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from megatron_mixtral.data.datasets.blend import DOCUMENTS_CHECKED, Blend, blend_of, prefixes_of
from megatron_mixtral.data.indexed import IndexFile
from megatron_mixtral.errors import DataError
from megatron_mixtral.tokenizer import chat

IDS, LABELS = "_packed_input_ids_document", "_packed_labels_document"


def instruction_blend(words: Sequence[str] | None) -> Blend | None:
    """`--data-path` of instruction data; `blend_of` says which forms there are. `DataError` for missing files."""
    return blend_of(words, endings=(IDS, LABELS))


class InstructionFiles:
    """The rows of one set: a row is a document, its samples are the sequences of the document.

    `len()` is the number of rows. Raises `DataError` where the files do not belong together.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._ids, self._labels = IndexFile(prefix + IDS), IndexFile(prefix + LABELS)
        for name in ("lengths", "documents"):
            if not np.array_equal(getattr(self._ids, name), getattr(self._labels, name)):
                raise DataError(f"{prefix}{IDS} and {prefix}{LABELS} differ in the {name} they list: they are not of "
                                "one set; preprocess it again")

    def __len__(self) -> int:
        return self._ids.documents.size - 1

    @property
    def packed(self) -> bool:
        """Whether some row holds several samples."""
        return len(self) < len(self._ids)

    def longest(self, multiple: int = 1) -> int:
        """The most positions (ids that predict another id) of a row, those of each sample rounded up to `multiple`."""
        positions = -(-(self._ids.lengths.astype(np.int64) - 1) // multiple) * multiple
        return int(np.add.reduceat(positions, self._ids.documents[:-1]).max())

    def row(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, labels) of each sample of a row, both int32; a label is the id itself or `chat.IGNORED`."""
        samples = range(int(self._ids.documents[number]), int(self._ids.documents[number + 1]))
        return [(self._ids.sequence(sample), self._labels.sequence(sample)) for sample in samples]


def check_instruction(
    blends: Iterable[Blend | None], vocab_size: int, seq_length: int, micro_batch_size: int, multiple: int = 1
) -> None:
    """`DataError` for sets that are not whole, do not fit a row, or whose first rows hold ids the model has no row for;
    also for packed sets in micro-batches of several rows. Each sample is padded to `multiple` positions.
    """
    for prefix in prefixes_of(blends):
        files = InstructionFiles(prefix)
        if not len(files):
            raise DataError(f"{prefix} holds no row")
        if files.longest() > seq_length:
            raise DataError(f"{prefix}: a row has {files.longest()} positions, --seq-length has {seq_length}: raise "
                            f"it, or preprocess with --seq-length {seq_length}, which leaves longer samples out")
        if files.longest(multiple) > seq_length:
            raise DataError(f"{prefix}: a row has {files.longest()} positions, and {files.longest(multiple)} with each "
                            f"sample padded to a multiple of {multiple} = 2 x --context-parallel-size, while "
                            f"--seq-length has {seq_length}: preprocess with --pack --pad-to-multiple-of {multiple}, "
                            "or raise --seq-length")
        if files.packed and micro_batch_size > 1:
            raise DataError(f"{prefix} is packed, so a row already holds several samples: set --micro-batch-size 1 "
                            f"(not {micro_batch_size}); pack to a longer --seq-length for more tokens at a time")
        for number in range(min(DOCUMENTS_CHECKED, len(files))):
            _check_row(prefix, number, files, vocab_size)


def _check_row(prefix: str, number: int, files: InstructionFiles, vocab_size: int) -> None:
    for ids, labels in files.row(number):
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise DataError(f"{prefix}: row {number} holds ids from {ids.min()} to {ids.max()}, the model's vocabulary "
                            f"has {vocab_size}; it was written with another tokenizer")
        if not ((labels == ids) | (labels == chat.IGNORED)).all():
            raise DataError(f"{prefix}: row {number} has labels that are neither its ids nor {chat.IGNORED}")
