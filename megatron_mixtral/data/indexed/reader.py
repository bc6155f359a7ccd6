"""Reader of an indexed dataset's `.idx`, with numpy alone: sizes and lengths without importing the engine.

A run looks at its data sets with it before it starts. The format is in `writer.py`.
"""

import struct
from pathlib import Path

import numpy as np

from megatron_mixtral.data.indexed.writer import DTYPE_CODES, HEADER
from megatron_mixtral.errors import DataError

_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
_COUNTS_AT = len(HEADER) + 9  # after the version (8 bytes) and the dtype code (1 byte)
_ARRAYS_AT = _COUNTS_AT + 16


def bare_prefix(name: str) -> str:
    """The prefix of a data set that is named with or without an ending."""
    return name.removesuffix(".bin").removesuffix(".idx")


class IndexFile:
    """One `{prefix}.idx`, memory-mapped, and the ids of its `.bin`.

    Attributes: `prefix`, `dtype` of an id, `tokens`, `lengths` (int32, tokens of each sequence), `pointers` (int64, its
    first byte in the `.bin`), `documents` (int64, first sequence of each document, then the number of sequences).
    """

    def __init__(self, prefix: str) -> None:
        """Raises `DataError` where the pair is not whole: unknown header, or sizes that contradict one another."""
        self.prefix = prefix
        path, tokens_path = Path(prefix + ".idx"), Path(prefix + ".bin")
        with path.open("rb") as stream:
            head = stream.read(_ARRAYS_AT)
        if len(head) < _ARRAYS_AT or not head.startswith(HEADER):
            raise DataError(f"{path} is not the index of a data set: it does not begin with {HEADER!r}")
        version, code, sequences, boundaries = struct.unpack("<QBQQ", head[len(HEADER):])
        if version != 1 or code not in _DTYPES:
            raise DataError(f"{path}: version {version} and dtype code {code}; expected version 1 and a code of "
                            f"{sorted(_DTYPES)} (int32, uint16)")
        self.dtype = _DTYPES[code]
        expected, found = _ARRAYS_AT + 12 * sequences + 8 * boundaries, path.stat().st_size
        if found < expected:
            raise DataError(f"{path} has {found} bytes; {sequences} sequences and {boundaries} document boundaries "
                            f"need {expected}: it was cut off, write the data set again")
        mapped = np.memmap(path, mode="r", dtype=np.uint8)
        cuts = _ARRAYS_AT + np.cumsum([0, 4 * sequences, 8 * sequences, 8 * boundaries])
        self.lengths = mapped[cuts[0]:cuts[1]].view("<i4")
        self.pointers = mapped[cuts[1]:cuts[2]].view("<i8")
        self.documents = mapped[cuts[2]:cuts[3]].view("<i8")
        self.tokens = int(self.lengths.sum(dtype=np.int64))
        size = tokens_path.stat().st_size
        if size != self.tokens * self.dtype.itemsize:
            raise DataError(f"{tokens_path} has {size} bytes; the {self.tokens} tokens that {path.name} lists need "
                            f"{self.tokens * self.dtype.itemsize}: the two files are not of one data set")

    def __len__(self) -> int:
        return len(self.lengths)

    def sequence(self, index: int) -> np.ndarray:
        """The ids of one sequence, `dtype` (length,)."""
        return np.fromfile(self.prefix + ".bin", self.dtype, int(self.lengths[index]), offset=int(self.pointers[index]))
