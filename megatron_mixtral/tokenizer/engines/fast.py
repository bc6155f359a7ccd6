"""The `fastokens` library as an engine: optional (`pip install megatron-mixtral[fast]`), for byte-level BPE above all.

It is handed one document at a time: of a batch it would make threads for all cores, in each worker.
"""

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from megatron_mixtral.tokenizer.engines.base import EngineUnavailable, SpecialTokens, frame
from megatron_mixtral.tokenizer.tokenizer import JsonTokenizer, Tokenizer


class FastokensEngine:
    """Reads a `tokenizer.json`, with its special tokens taken for text."""

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
        counts = np.array([piece.size for piece in pieces], dtype=np.int64)
        ids = np.concatenate(pieces) if pieces else np.zeros(0, np.uint32)
        return frame(ids, counts, specials, self._tokenizer.vocab_size)
