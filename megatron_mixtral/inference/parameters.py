"""What a request may ask for (`SamplingParams`), and what it gets, step by step (`Event`). Standard library only.

Every program that takes requests builds a `SamplingParams`, which validates itself: its sentences are the answers that
a user of the command, of the chat or of the server reads.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megatron_mixtral.errors import ConfigError

MOST_TOP_LOGPROBS = 20
FinishReason = Literal["stop", "length", "cancelled", "error", "scored"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is continued. The defaults are greedy: the most probable token, at most 128 times.

    `ConfigError` for a value that cannot be. Lists are taken for `stop` and `stop_token_ids`, and kept as tuples.
    """

    max_tokens: int | None = 128  # new tokens of each continuation; None: until the context is full
    temperature: float = 0.0  # 0: greedy, and top_k, top_p and seed do nothing
    top_k: int = 0  # only the k most probable tokens; 0: all
    top_p: float = 1.0  # the fewest tokens that hold this probability together, after top_k
    repetition_penalty: float = 1.0  # above 1: against tokens of the prompt and of the text so far (also when greedy)
    seed: int | None = None  # the same text for the same seed; None: another one each time
    n: int = 1  # continuations of the prompt, each with a seed of its own
    stop: tuple[str, ...] = ()  # texts before which a continuation ends; they are not part of it
    stop_token_ids: tuple[int, ...] = ()  # besides the model's own
    ignore_eos: bool = False  # go on after the model's own stop ids (benchmarks)
    logprobs: int | None = None  # None: none; 0: of each new token; k: and of the k most probable ones (at most 20)
    adapter: bool = True  # where the model has adapters: with them, or its base alone

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if isinstance(value, str | int):
                value = (value,)
            object.__setattr__(self, name, tuple(value or ()))
        _integer("max_tokens", self.max_tokens, 1, "or null", nullable=True)
        _number("temperature", self.temperature, 0, math.inf, "a number of at least 0 (0: greedy)")
        _integer("top_k", self.top_k, 0, "(0: all tokens)")
        _number("top_p", self.top_p, 0, 1, "a number above 0 and at most 1", above=True)
        _number("repetition_penalty", self.repetition_penalty, 0, math.inf, "a number above 0 (1: none)", above=True)
        for name in ("temperature", "top_p", "repetition_penalty"):
            object.__setattr__(self, name, float(getattr(self, name)))  # torch takes no integer above 2^64
        _integer("seed", self.seed, 0, "below 2^63, or null", nullable=True, most=2**63 - 1)
        _integer("n", self.n, 1, "")
        _integer("logprobs", self.logprobs, 0, f"and at most {MOST_TOP_LOGPROBS}, or null", nullable=True,
                 most=MOST_TOP_LOGPROBS)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(f"stop is {list(self.stop)!r}, expected texts that are not empty")
        for token_id in self.stop_token_ids:
            _integer("stop_token_ids", token_id, 0, "each")
        if not isinstance(self.adapter, bool):
            raise ConfigError(f"adapter is {self.adapter!r}, expected true or false")

    @property
    def greedy(self) -> bool:
        """Whether each token is the most probable one: so near to 0, logits over temperature leave no other, or are
        too large for their type.
        """
        return self.temperature < 1e-5


@dataclass(frozen=True, kw_only=True)
class ScoringParams:
    """Of a request that is not continued: how probable given tokens are, each after the prompt up to its place.

    `targets[-1]` are tokens that may come after the prompt's last token, `targets[-2]` after the one before, and so on.
    The one event has their log-probabilities in this order, and `top` the most probable token of the place.
    """

    targets: tuple[tuple[int, ...], ...]
    adapter: bool = True
    n: ClassVar[int] = 1
    logprobs: ClassVar[int] = 1
    stop: ClassVar[tuple[str, ...]] = ()
    greedy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.targets or not all(self.targets):
            raise ConfigError("nothing to score: give at least one token for each of the prompt's last places")


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities at a place: before penalty, temperature, top-k and top-p."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-prob) of the most probable tokens, best first


@dataclass(frozen=True)
class Event:
    """News of one continuation. `Engine.step` gives at most one a step for each; the last has a `finish_reason`.

    `text` is whole characters only: bytes of an unfinished one, and text that may be the beginning of a stop text, come
    with a later event. The pieces of a continuation, put together, are its text.
    """

    request_id: str
    index: int  # which of the request's n continuations
    token_ids: tuple[int, ...] = ()  # new ones, a stop id or the tokens of a stop text included
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each of token_ids, where they were asked for
    finish_reason: FinishReason | None = None  # "length": max_tokens, or the context is full
    stop_reason: int | str | None = None  # the stop id or stop text, where finish_reason is "stop"
    message: str | None = None  # a sentence where the context is full, or for an error


def _number(name: str, value: Any, least: float, most: float, expected: str, above: bool = False) -> None:
    # Of an integer that no float holds, isfinite would raise OverflowError.
    fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not fits or not least <= value <= most or (above and value == least):
        raise ConfigError(f"{name} is {value!r}, expected {expected}")


def _integer(name: str, value: Any, least: int, also: str, nullable: bool = False, most: float = math.inf) -> None:
    if value is None and nullable:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"{name} is {value!r}, expected " + f"an integer of at least {least} {also}".rstrip())
