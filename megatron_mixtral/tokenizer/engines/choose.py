"""Which engine encodes a run, and the proof that its ids are those of the published tokenizer."""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_mixtral.errors import ConfigError
from megatron_mixtral.tokenizer.engines.base import Engine, EngineUnavailable, SpecialTokens
from megatron_mixtral.tokenizer.engines.libraries import FastokensEngine, ReferenceEngine
from megatron_mixtral.tokenizer.engines.native import NativeEngine
from megatron_mixtral.tokenizer.tokenizer import NASTY_STRINGS, Tokenizer

logger = logging.getLogger(__name__)

ENGINES = ("auto", "native", "fastokens", "tokenizers", "sentencepiece")
FAST: dict[str, Callable[[Tokenizer], Engine]] = {"native": NativeEngine, "fastokens": FastokensEngine}  # in this order
BARE = SpecialTokens(None, None)


@dataclass(frozen=True)
class EngineChoice:
    """`proof` is None for the reference itself, which needs none; `declined` says why others were not taken."""

    engine: Engine
    reason: str
    proof: dict[str, Any] | None
    declined: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return {
            "engine": self.engine.name,
            "engine_version": self.engine.version,
            "reason": self.reason,
            "proof": self.proof,
            "declined": self.declined,
        }


def make_engine(name: str, tokenizer: Tokenizer) -> Engine:
    """Raises `EngineUnavailable`, with the reason, when the engine cannot serve this tokenizer on this machine."""
    if name in FAST:
        return FAST[name](tokenizer)
    if name != tokenizer.kind:
        raise EngineUnavailable(f"it does not read {tokenizer.path}; give --tokenizer-model the file that it reads")
    return ReferenceEngine(tokenizer)


def choose_engine(wanted: str, tokenizer: Tokenizer, documents: Sequence[str]) -> EngineChoice:
    """The engine of `--tokenizer-engine`; for `auto` the first of native, fastokens and the reference that is proved.

    `documents` are texts of the run, on which an engine is proved, besides strings that are known to be difficult.

    Raises:
        ConfigError: a named engine that cannot serve, or that gives other ids than the published tokenizer.
    """
    if wanted == "gigatoken":
        raise ConfigError("--tokenizer-engine gigatoken is gone, since some of its ids differ from the published "
                          "tokenizer's: leave the flag out, and pip install megatron-mixtral[fast] for fastokens.")
    if wanted not in ENGINES:
        raise ConfigError(f"--tokenizer-engine {wanted} is not one of: {', '.join(ENGINES)}.")
    candidates = [*FAST, tokenizer.kind] if wanted == "auto" else [wanted]
    declined: dict[str, str] = {}
    for name in candidates:
        try:
            engine = make_engine(name, tokenizer)
            proof = None if name == tokenizer.kind else prove(engine, tokenizer, documents)
        except EngineUnavailable as error:
            declined[name] = str(error)
            if wanted != "auto":
                raise ConfigError(f"--tokenizer-engine {name} cannot serve {tokenizer.path}: {error}.") from error
            logger.warning("tokenizer engine %s is not used: %s", name, error)
            continue
        reason = f"--tokenizer-engine {name}" if wanted != "auto" else "the fastest that serves this tokenizer here"
        return EngineChoice(engine, reason, proof, declined)
    raise AssertionError("the reference always serves")


def prove(engine: Engine, tokenizer: Tokenizer, documents: Sequence[str]) -> dict[str, Any]:
    """Encode `documents`, `NASTY_STRINGS` and control strings with the engine and with its tokenizer; returns what was
    compared.

    Raises `EngineUnavailable`, with the text and both encodings, where one id differs.
    """
    difficult = [*NASTY_STRINGS, *(f"a{control} b" for control in tokenizer.control_tokens())]
    texts = [*difficult, *documents]
    reference = ReferenceEngine(tokenizer)
    found, expected = (_text_by_text(*each.encode(texts, BARE)) for each in (engine, reference))
    for text, ours, theirs in zip(texts, found, expected, strict=True):
        if ours != theirs:
            at = next(index for index, (x, y) in enumerate(itertools.zip_longest(ours, theirs)) if x != y)
            raise EngineUnavailable(f"its ids are not those of {reference.name}: from token {at} of the text "
                                    f"{text[:40]!r} on, {ours[at:at + 6]} instead of {theirs[at:at + 6]}")
    return {
        "reference": f"{reference.name} {reference.version}",
        "documents": len(documents),
        "difficult_strings": len(difficult),
        "characters": sum(map(len, texts)),
        "tokens": sum(map(len, expected)),
    }


def _text_by_text(ids: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
