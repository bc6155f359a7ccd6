"""The published tokenizer itself as an engine, `sentencepiece` or `tokenizers`: slow, and right by definition."""

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from megatron_mixtral.tokenizer.engines.base import SpecialTokens, frame
from megatron_mixtral.tokenizer.tokenizer import Tokenizer


class ReferenceEngine:
    """Encodes text by text with the tokenizer that was loaded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.name = tokenizer.kind
        self.version = version(tokenizer.kind)

    def encode(self, texts: Sequence[str], specials: SpecialTokens) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine.encode`."""
        flat: list[int] = []
        counts = np.zeros(len(texts), dtype=np.int64)
        for index, text in enumerate(texts):
            ids = self._tokenizer.encode(text)
            flat.extend(ids)
            counts[index] = len(ids)
        return frame(np.array(flat, dtype=np.int64), counts, specials, self._tokenizer.vocab_size)
