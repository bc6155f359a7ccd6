"""Documents to arrays of ids: the one seam behind which an encoding engine works.

A worker hands over a list of texts and gets back one flat array of ids and the length of each document. What encodes
them (`engines/`) is known only here; nothing outside handles single ids.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.tokenizer.engines import Engine, ReferenceEngine, SpecialTokens, frame, token_dtype
from megatron_mixtral.tokenizer.tokenizer import JsonTokenizer, Tokenizer

LONGEST_DOCUMENT = np.iinfo(np.int32).max  # tokens; lengths in the index are int32


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


@dataclass
class ControlCounts:
    """With `--allow-special-in-text`: documents with control strings in their text, and the control ids these gave."""

    documents: int = 0
    tokens: int = 0


class DocumentEncoder:
    """Encodes documents with one tokenizer, framed by the same control ids.

    Without an `engine` the tokenizer itself encodes. With `allow_special`, control strings in a text become control
    ids, which are counted. An encoder can be pickled, so that worker processes need not read the tokenizer again.
    """

    def __init__(
        self, tokenizer: Tokenizer, specials: SpecialTokens, engine: Engine | None = None, allow_special: bool = False
    ) -> None:
        """Raises `ConfigError` when control strings are allowed and the tokenizer cannot find them in texts."""
        self.tokenizer = tokenizer
        self.specials = specials
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._control_counts = ControlCounts()
        self._engine = engine or ReferenceEngine(tokenizer)
        self._controls: ControlStrings | None = None
        if allow_special:
            if not isinstance(tokenizer, JsonTokenizer):
                raise ConfigError(
                    f"--allow-special-in-text needs a tokenizer.json: sentencepiece, which reads {tokenizer.path}, "
                    f"never takes text for control ids."
                )
            self._controls = ControlStrings(tokenizer.control_tokens())
            self._control_ids = list(tokenizer.control_tokens().values())

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """`texts` -> (ids, lengths): ids of all documents in order, `self.dtype` (total,), and int32 (len(texts),).

        A document that gives no id at all has length 0 and is given neither BOS nor EOS: the caller drops it.

        Raises:
            DataError: an id outside the vocabulary, or a document of 2**31 tokens or more.
        """
        apart = [self._controls.occur_in(text) for text in texts] if self._controls else []
        if any(apart):
            ids, lengths = self._encode_both(texts, np.array(apart))
        else:
            ids, lengths = self._engine.encode(texts, self.specials)
        if lengths.size and int(lengths.max()) > LONGEST_DOCUMENT:
            raise DataError("A document has 2**31 tokens or more, which the index format cannot hold. Cut it.")
        return ids, lengths.astype(np.int32)

    def take_control_counts(self) -> ControlCounts:
        """The counts since the last call."""
        taken, self._control_counts = self._control_counts, ControlCounts()
        return taken

    def _encode_both(self, texts: Sequence[str], apart: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `Engine.encode`, with control ids in the texts marked in `apart` (bool); in the order given."""
        lengths = np.zeros(len(texts), dtype=np.int64)
        pieces: dict[int, np.ndarray] = {}
        for encode, marks in ((self._engine.encode, ~apart), (self._encode_with_controls, apart)):
            numbers = np.flatnonzero(marks)
            ids, lengths[numbers] = encode([texts[n] for n in numbers], self.specials)
            # Cut at all ends, so that there is an empty piece too many, even of no text at all.
            pieces.update(zip(numbers, np.split(ids, np.cumsum(lengths[numbers])), strict=False))
        return np.concatenate([pieces[number] for number in range(len(texts))]), lengths

    def _encode_with_controls(self, texts: Sequence[str], specials: SpecialTokens) -> tuple[np.ndarray, np.ndarray]:
        pieces = [np.array(self.tokenizer.encode_with_controls(text), dtype=np.int64) for text in texts]
        self._control_counts.documents += len(texts)
        self._control_counts.tokens += sum(int(np.isin(piece, self._control_ids).sum()) for piece in pieces)
        return frame(pieces, specials, self.tokenizer.vocab_size)


class ControlStrings:
    """Finds out whether a text has any of some strings in it."""

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = sorted(set(filter(None, strings)))
        # Most texts have not even what all the strings begin with, and `in` is much faster than a regular expression.
        self._start = os.path.commonprefix(self._strings)
        self._any = re.compile("|".join(map(re.escape, self._strings)))

    def occur_in(self, text: str) -> bool:
        return bool(self._strings) and self._start in text and self._any.search(text) is not None
