"""Our own extension as an engine: BPE with byte fallback in C++ (`native_bpe/`), one id after the other without Python.

Exact by construction. Merges only ever join neighbours, so between two characters that no merge can bring together a
text can be cut, and the words on both sides encoded independently. Words repeat, so most are found in a cache; what is
not there is encoded by plain byte-pair merging, by rank or score as the published tokenizer does.
"""

import importlib
import itertools
import re
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import megatron_mixtral
from megatron_mixtral.errors import DataError
from megatron_mixtral.tokenizer.engines.base import EngineUnavailable, SpecialTokens, frame, token_dtype
from megatron_mixtral.tokenizer.engines.bpe_tables import PREFIX_ALWAYS, PREFIX_NONE, bpe_tables
from megatron_mixtral.tokenizer.tokenizer import Tokenizer

MODULE = "megatron_mixtral.tokenizer.engines._native_bpe"
SOURCES = Path(__file__).parent / "native_bpe"  # the C++ files, which only a checkout has
BUILD = "python setup.py build_ext --inplace, or pip install again, where a C++ compiler is"


class NativeEngine:
    """Holds tables of a few MB and a cache of 4 MB. Threads that share an engine wait for one another."""

    name = "native"
    version = megatron_mixtral.__version__

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises `EngineUnavailable` where the extension is not built, or for another kind of tokenizer."""
        load_module()
        self._tables = bpe_tables(tokenizer)
        self._dtype = token_dtype(self._tables.vocab_size)
        # The longest first: of two that begin alike, sentencepiece takes the longer.
        defined = sorted(self._tables.defined, key=len, reverse=True)
        self._defined = re.compile(f"({'|'.join(map(re.escape, defined))})") if defined else None

    @cached_property
    def _encoder(self) -> Any:
        return self._made(self._tables.prefix)

    @cached_property
    def _within(self) -> Any:
        """Of parts of a text, with nothing put before them."""
        return self._made(PREFIX_NONE)

    def _made(self, prefix: int) -> Any:
        tables = self._tables
        return load_module().Encoder(
            tables.vocab_size, tables.characters, tables.merges, tables.joins, tables.byte_ids, prefix
        )

    def __getstate__(self) -> dict[str, Any]:
        """The tables, 1 MB: another process need not read the tokenizer again."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_encoder", "_within")}

    def encode(self, texts: Sequence[str], specials: SpecialTokens) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine.encode`. Ids outside the vocabulary cannot arise: the tables were checked."""
        if self._defined is not None and any(map(self._defined.search, texts)):
            return frame([self._cut(text) for text in texts], specials, self._tables.vocab_size)
        return self._encode(self._encoder, texts, specials)

    def _cut(self, text: str) -> np.ndarray:
        """The ids of a text with user-defined pieces in it: nothing joins one, so what is between is encoded apart."""
        if self._tables.prefix == PREFIX_ALWAYS and text:
            text = " " + text
        parts = self._defined.split(text) if self._defined else [text]
        apart = self._encode(self._within, parts[::2], SpecialTokens(None, None))
        pieces = np.split(apart[0], np.cumsum(apart[1])[:-1])
        defined = [np.array([self._tables.defined[part]]) for part in parts[1::2]]
        return np.concatenate([*itertools.chain(*zip(pieces, defined, strict=False)), pieces[-1]])

    def _encode(self, encoder: Any, texts: Sequence[str], specials: SpecialTokens) -> tuple[np.ndarray, np.ndarray]:
        bos = -1 if specials.bos_id is None else specials.bos_id
        eos = -1 if specials.eos_id is None else specials.eos_id
        try:
            ids, lengths = encoder.encode(texts, bos, eos, self._dtype.itemsize)
        except UnicodeEncodeError as error:
            raise DataError(f"A text has half of a surrogate pair in it: {error}") from error
        except OverflowError as error:
            raise DataError(f"A document cannot be encoded: {error}. Cut it.") from error
        return np.frombuffer(ids, dtype=self._dtype), np.frombuffer(lengths, dtype=np.int64)


def most_characters(tokenizer: Tokenizer) -> int | None:
    """The most characters of a text that one id stands for, with or without control ids in it: a text of n characters
    has at least n / that many ids. None for a tokenizer that these tables do not describe: it may leave characters out.
    """
    try:
        longest = bpe_tables(tokenizer).longest
    except EngineUnavailable:
        return None
    return None if tokenizer.controls_take_spaces() else max([longest, *map(len, tokenizer.control_tokens())])


def load_module() -> ModuleType:
    """The module `_native_bpe`. Raises `EngineUnavailable` where it is not built, or was built from other sources."""
    try:
        found = importlib.import_module(MODULE)
    except ImportError as error:
        raise EngineUnavailable(f"its extension is not built ({error}): {BUILD}") from error
    if SOURCES.is_dir() and found.SOURCES != fingerprint():
        raise EngineUnavailable(f"its extension was built from other sources than these: {BUILD}")
    return found


def fingerprint() -> str:
    """A checksum of the C++ files, which `setup.py` compiles in as well, so that a stale build is noticed."""
    files = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    return f"{zlib.crc32(b''.join(path.read_bytes() for path in files)):08x}"
