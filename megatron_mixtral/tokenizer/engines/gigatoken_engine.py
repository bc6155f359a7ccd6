"""The `gigatoken` library as an engine: optional (`pip install megatron-mixtral[fast]`), for byte-level BPE above all.

It is handed documents that we parsed. Its own reader of files is not used: at a line that it cannot parse it stops
without an error and leaves out the rest. Nor is its `encode_batch`: it forgets the words it has met after every batch,
which makes it slower by half, needs the library `awkward`, which takes half a second to import, and starts threads,
after which a process cannot be forked.
"""

import json
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from megatron_mixtral.tokenizer.engines.base import EngineUnavailable, SpecialTokens, checked
from megatron_mixtral.tokenizer.engines.mixed import ControlStrings, encode_apart
from megatron_mixtral.tokenizer.engines.reference import ReferenceEngine
from megatron_mixtral.tokenizer.tokenizer import JsonTokenizer, Tokenizer

RENEWED_AFTER = 1 << 26  # characters; the words that it remembers take 1 to 4 bytes for each


class GigatokenEngine:
    """gigatoken turns `<s>` in a text into the control id, unless it is not told of such tokens.

    From a tokenizer.json they are left out. A sentencepiece model is read by the library itself, so texts with control
    strings go to the reference.
    """

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises `EngineUnavailable` without the library, or for a tokenizer that it does not read."""
        self._tokenizer = tokenizer
        as_json = isinstance(tokenizer, JsonTokenizer)
        self._content = _without_control_tokens(tokenizer) if as_json else None
        self._controls = ControlStrings([] if as_json else tokenizer.control_tokens())
        self._reference = ReferenceEngine(tokenizer)
        self._vocab_size = tokenizer.vocab_size
        self._renew()
        self.version = version("gigatoken")

    def _renew(self) -> None:
        try:
            import gigatoken
        except ImportError as error:
            raise EngineUnavailable("it is not installed: pip install megatron-mixtral[fast]") from error
        try:
            if self._content is None:
                self._model = gigatoken.Tokenizer.from_sentencepiece(str(self._tokenizer.path))
            else:
                self._model = gigatoken.Tokenizer.from_json(self._content)
        except Exception as error:  # noqa: BLE001 - its errors, and its Rust panics, have no class of their own
            raise EngineUnavailable(f"it does not read {self._tokenizer.path}: {error}") from error
        self._encoded = 0

    def __reduce__(self) -> tuple[type["GigatokenEngine"], tuple[Tokenizer]]:
        return GigatokenEngine, (self._tokenizer,)

    def encode(self, texts: Sequence[str], specials: SpecialTokens) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine.encode`."""
        apart = [self._controls.occur_in(text) for text in texts]
        if any(apart):
            return encode_apart(texts, apart, specials, self._encode_plain, self._reference.encode)
        return self._encode_plain(texts, specials)

    def _encode_plain(self, texts: Sequence[str], specials: SpecialTokens) -> tuple[np.ndarray, np.ndarray]:
        before, behind = (
            np.array([] if one is None else [one], np.uint32) for one in (specials.bos_id, specials.eos_id)
        )
        pieces, lengths = [before[:0]], np.zeros(len(texts), np.int64)
        for index, text in enumerate(texts):
            if self._encoded >= RENEWED_AFTER:  # it never forgets a word, so its memory would grow with the corpus
                self._renew()
            self._encoded += len(text)
            ids = self._model.encode(text)
            if ids.size:
                pieces += (before, ids, behind)
                lengths[index] = before.size + ids.size + behind.size
        return checked(np.concatenate(pieces), self._vocab_size), lengths


def _without_control_tokens(tokenizer: JsonTokenizer) -> str:
    content = json.loads(tokenizer.serialized())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    return json.dumps(content)
