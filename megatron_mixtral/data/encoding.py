"""Documents to arrays of ids: the one seam behind which an encoding engine works.

A worker hands over a list of texts and gets back one flat array of ids and the length of each document. What encodes
them (sentencepiece, `tokenizers`, later a native engine) is known only here; nothing outside handles single ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mixtral.data.tokenizer import Tokenizer
from megatron_mixtral.errors import ConfigError, DataError


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else int32: the rule of the engine (`DType.optimal_dtype`: below 65,500)."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass(frozen=True)
class SpecialTokens:
    """Which control ids frame each document; None adds nothing."""

    bos_id: int | None
    eos_id: int | None


def special_tokens(tokenizer: Tokenizer, prepend_bod: bool, append_eod: bool) -> SpecialTokens:
    """Raises `ConfigError` when a flag asks for a token that the tokenizer does not have."""
    for wanted, token_id, flag, key in (
        (prepend_bod, tokenizer.bos_id, "--prepend-bod", "bos_token"),
        (append_eod, tokenizer.eos_id, "--append-eod", "eos_token"),
    ):
        if wanted and token_id is None:
            raise ConfigError(
                f"{flag} needs the {key}, and {tokenizer.path} has none. Declare {key} in tokenizer_config.json beside "
                f"it, or leave the flag out."
            )
    return SpecialTokens(tokenizer.bos_id if prepend_bod else None, tokenizer.eos_id if append_eod else None)


class DocumentEncoder:
    """Encodes documents with one tokenizer, framed by the same control ids."""

    def __init__(self, tokenizer: Tokenizer, specials: SpecialTokens) -> None:
        self.tokenizer = tokenizer
        self.specials = specials
        self.dtype = token_dtype(tokenizer.vocab_size)

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """`texts` -> (ids, lengths): ids of all documents in order, `self.dtype` (total,), and int32 (len(texts),).

        A document that gives no id at all has length 0 and is given neither BOS nor EOS: the caller drops it.

        Raises:
            DataError: an id outside the vocabulary, or a document of 2**31 tokens or more.
        """
        encode, bos, eos = self.tokenizer.encode, self.specials.bos_id, self.specials.eos_id
        flat: list[int] = []
        lengths = np.zeros(len(texts), dtype=np.int64)
        for index, text in enumerate(texts):
            ids = encode(text)
            if not ids:
                continue
            before = len(flat)
            if bos is not None:
                flat.append(bos)
            flat.extend(ids)
            if eos is not None:
                flat.append(eos)
            lengths[index] = len(flat) - before
        wide = np.array(flat, dtype=np.int64)
        if wide.size and not 0 <= int(wide.min()) <= int(wide.max()) < self.tokenizer.vocab_size:
            raise DataError(
                f"{self.tokenizer.path} gave ids from {wide.min()} to {wide.max()}, outside its vocabulary of "
                f"{self.tokenizer.vocab_size}."
            )
        if lengths.size and int(lengths.max()) > np.iinfo(np.int32).max:
            raise DataError("A document has 2**31 tokens or more, which the index format cannot hold. Cut it.")
        return wide.astype(self.dtype), lengths.astype(np.int32)
