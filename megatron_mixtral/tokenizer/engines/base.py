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


def frame(pieces: Sequence[np.ndarray], specials: SpecialTokens, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids of each text, without control ids, to what `Engine.encode` returns.

    Raises `DataError` for an id outside the vocabulary, before a narrower dtype could wrap it.
    """
    before, after = ([] if control is None else [np.array([control])] for control in (specials.bos_id, specials.eos_id))
    framed = [part for piece in pieces if piece.size for part in (*before, piece, *after)]
    ids = np.concatenate(framed) if framed else np.zeros(0, np.int64)
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise DataError(f"Encoding gave ids from {ids.min()} to {ids.max()}, outside the vocabulary of {vocab_size}.")
    lengths = [piece.size and len(before) + piece.size + len(after) for piece in pieces]
    return ids.astype(token_dtype(vocab_size), copy=False), np.array(lengths, dtype=np.int64)
