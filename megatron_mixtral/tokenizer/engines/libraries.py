"""Libraries as engines: the published tokenizer itself, slow and right by definition, and `fastokens`.

Both are handed one document at a time. Of a batch `fastokens` would make threads for all cores, in each worker.
"""

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from megatron_mixtral.tokenizer.engines.base import EngineUnavailable, SpecialTokens, frame
from megatron_mixtral.tokenizer.tokenizer import JsonTokenizer, Tokenizer


class ReferenceEngine:
    """`sentencepiece` or `tokenizers`, with the tokenizer that was loaded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.name = tokenizer.kind
        self.version = version(tokenizer.kind)

    def encode(self, texts: Sequence[str], specials: SpecialTokens) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine.encode`."""
        pieces = [np.array(self._tokenizer.encode(text), dtype=np.int64) for text in texts]
        return frame(pieces, specials, self._tokenizer.vocab_size)


class FastokensEngine:
    """Reads a `tokenizer.json`, with its special tokens taken for text; for byte-level BPE above all. Optional
    (`pip install megatron-mixtral[fast]`).
    """

    name = "fastokens"

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises `EngineUnavailable` without the library, or for a tokenizer that it does not read."""
        if not isinstance(tokenizer, JsonTokenizer):
            raise EngineUnavailable(f"it reads a tokenizer.json, not {tokenizer.path}")
        try:
            import fastokens
        except ImportError as error:
            raise EngineUnavailable("it is not installed: pip install megatron-mixtral[fast]") from error
        try:
            self._model = fastokens.Tokenizer.from_json_str(tokenizer.serialized())
        except Exception as error:  # noqa: BLE001 - its errors have no class of their own
            raise EngineUnavailable(f"it does not read {tokenizer.path}: {error}") from error
        self._tokenizer = tokenizer
        self.version = version("fastokens")

    def __reduce__(self) -> tuple[type["FastokensEngine"], tuple[Tokenizer]]:
        return FastokensEngine, (self._tokenizer,)

    def encode(self, texts: Sequence[str], specials: SpecialTokens) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine.encode`."""
        pieces = [np.frombuffer(self._model.encode_batch_flat([text], False, True)[0], np.uint32) for text in texts]
        return frame(pieces, specials, self._tokenizer.vocab_size)
