"""The `gigatoken` library as an engine: optional (`pip install megatron-mixtral[fast]`), for byte-level BPE above all.

It is handed documents that we parsed. Its own reader of files is not used: at a line that it cannot parse it stops
without an error and leaves out the rest.
"""

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from megatron_mixtral.data.engines.base import EngineUnavailable, SpecialTokens, frame
from megatron_mixtral.data.engines.mixed import ControlStrings, encode_apart
from megatron_mixtral.data.engines.reference import ReferenceEngine
from megatron_mixtral.data.tokenizer import Tokenizer


class GigatokenEngine:
    """gigatoken turns `<s>` in a text into the control id, always. Texts with such strings go to the reference."""

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises `EngineUnavailable` without the library, or for a tokenizer that it does not read."""
        try:
            import awkward
            import gigatoken
        except ImportError as error:
            raise EngineUnavailable("it is not installed: pip install megatron-mixtral[fast]") from error
        self.version = version("gigatoken")
        self._flatten, self._num = awkward.flatten, awkward.num
        path = str(tokenizer.path)
        try:
            is_json = tokenizer.kind == "tokenizers"
            self._model = gigatoken.Tokenizer(path) if is_json else gigatoken.Tokenizer.from_sentencepiece(path)
        except Exception as error:  # noqa: BLE001 - its errors, and its Rust panics, have no class of their own
            raise EngineUnavailable(f"it does not read {path}: {error}") from error
        self._tokenizer = tokenizer
        self._vocab_size = tokenizer.vocab_size
        self._controls = ControlStrings(tokenizer.control_tokens())
        self._reference = ReferenceEngine(tokenizer)

    def __reduce__(self) -> tuple[type["GigatokenEngine"], tuple[Tokenizer]]:
        return GigatokenEngine, (self._tokenizer,)

    def encode(self, texts: Sequence[str], specials: SpecialTokens) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine.encode`."""
        apart = [self._controls.occur_in(text) for text in texts]
        if any(apart):
            return encode_apart(texts, apart, specials, self._encode_plain, self._reference.encode)
        return self._encode_plain(texts, specials)

    def _encode_plain(self, texts: Sequence[str], specials: SpecialTokens) -> tuple[np.ndarray, np.ndarray]:
        if not texts:
            return frame(np.zeros(0, np.uint32), np.zeros(0, np.int64), specials, self._vocab_size)
        # One thread: the worker processes are what runs in parallel.
        found = self._model.encode_batch(list(texts), parallel=False)
        return frame(np.asarray(self._flatten(found)), np.asarray(self._num(found)), specials, self._vocab_size)
