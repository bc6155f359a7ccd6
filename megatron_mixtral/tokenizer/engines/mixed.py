"""Documents with control strings in them (`<s>`, `<|endoftext|>`), which some engines must hand to another one."""

import os
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from megatron_mixtral.tokenizer.engines.base import SpecialTokens

Encode = Callable[[Sequence[str], SpecialTokens], tuple[np.ndarray, np.ndarray]]


class ControlStrings:
    """Finds out whether a text has any of some strings in it."""

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = sorted(set(filter(None, strings)))
        # Most texts have not even what all the strings begin with, and `in` is much faster than a regular expression.
        self._start = os.path.commonprefix(self._strings)
        self._any = re.compile("|".join(map(re.escape, self._strings)))

    def occur_in(self, text: str) -> bool:
        return bool(self._strings) and self._start in text and self._any.search(text) is not None


def encode_apart(
    texts: Sequence[str], apart: Sequence[bool], specials: SpecialTokens, encode: Encode, encode_those_apart: Encode
) -> tuple[np.ndarray, np.ndarray]:
    """As `Engine.encode`: the texts marked in `apart` by one function, all others by the other, in the order given."""
    mask = np.array(apart, dtype=bool)
    lengths = np.zeros(len(texts), dtype=np.int64)
    pieces: list[np.ndarray | None] = [None] * len(texts)
    for function, indices in ((encode, np.flatnonzero(~mask)), (encode_those_apart, np.flatnonzero(mask))):
        ids, lengths[indices] = function([texts[i] for i in indices], specials)
        for index, piece in zip(indices, np.split(ids, np.cumsum(lengths[indices])[:-1]), strict=True):
            pieces[index] = piece
    return np.concatenate(pieces), lengths
