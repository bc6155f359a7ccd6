"""What an engine of encoding is, and what all of them share: the frame of BOS and EOS, and the check of the ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_mixtral.errors import ConfigError, DataError


class EngineUnavailable(ConfigError):
    """An engine cannot serve this tokenizer on this machine; the message is the reason, without the engine's name."""


@dataclass(frozen=True)
class SpecialTokens:
    """Which control ids frame each document; None adds nothing."""

    bos_id: int | None
    eos_id: int | None


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else int32: the rule of the training engine (`DType.optimal_dtype`: below 65,500)."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class Engine(Protocol):
    """Encodes texts as text: nothing in them becomes a control id. An engine can be pickled for a worker process."""

    name: str
    version: str

    def encode(self, texts: Sequence[str], specials: SpecialTokens) -> tuple[np.ndarray, np.ndarray]:
        """`texts` -> (ids, lengths): all ids in order, `token_dtype` (total,), and int64 (len(texts),).

        Each text is framed by `specials`, except one that gives no id at all: its length is 0.

        Raises `DataError` for ids outside the vocabulary and for texts that cannot be encoded.
        """
        ...


def checked(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """`ids` in `token_dtype`. Raises `DataError` for an id outside the vocabulary, which that could wrap."""
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise DataError(f"Encoding gave ids from {ids.min()} to {ids.max()}, outside the vocabulary of {vocab_size}.")
    return ids.astype(token_dtype(vocab_size), copy=False)


def frame(
    ids: np.ndarray, counts: np.ndarray, specials: SpecialTokens, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids without control ids, and their number in each text, to what `Engine.encode` returns.

    Raises `DataError` for an id outside the vocabulary, before a narrower dtype could wrap it.
    """
    ids = checked(ids, vocab_size)
    bos, eos = specials.bos_id is not None, specials.eos_id is not None
    lengths = counts.astype(np.int64)
    if not bos and not eos:
        return ids, lengths
    lengths[lengths > 0] += bos + eos
    framed = np.empty(int(lengths.sum()), dtype=token_dtype(vocab_size))
    is_text = np.ones(framed.size, dtype=bool)
    ends = np.cumsum(lengths)[lengths > 0]
    if bos:
        starts = ends - lengths[lengths > 0]
        framed[starts], is_text[starts] = specials.bos_id, False
    if eos:
        framed[ends - 1], is_text[ends - 1] = specials.eos_id, False
    framed[is_text] = ids
    return framed, lengths
