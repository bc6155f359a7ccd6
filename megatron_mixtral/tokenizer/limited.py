"""A tokenizer for prompts: a text that cannot fit the context is refused before it is encoded.

Encoding a text of a MiB takes seconds and tens of MB, for which a server's other requests, and its engine, would wait.
How many ids a text has at least is known from its length alone, where every character is part of an id and an id stands
for so many characters at most.
"""

from functools import cached_property
from typing import Any

from megatron_mixtral.errors import ConfigError
from megatron_mixtral.tokenizer.engines import native
from megatron_mixtral.tokenizer.tokenizer import Tokenizer

_SHORT = 4  # characters for each place of the context: a text of no more is encoded without a look at the vocabulary

_LONG = 2**14  # characters, which take about 15 ms: other threads do not wait for the encoding of more


class LimitedTokenizer:
    """`tokenizer`, whose `encode` and `encode_with_controls` raise `ConfigError` for a text that has more ids than
    `most`, where that is certain without encoding it. A long text is encoded while other threads go on. Everything else
    is the tokenizer's own.
    """

    def __init__(self, tokenizer: Tokenizer, most: int) -> None:
        self._tokenizer, self._most = tokenizer, most

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    @cached_property
    def _characters(self) -> int | None:
        return native.most_characters(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, as the tokenizer gives them."""
        self._check(text)
        return self._tokenizer.encode(text) if len(text) <= _LONG else self._tokenizer.encode_aside(text)

    def encode_with_controls(self, text: str) -> list[int]:
        """The ids of a text, its control strings as control ids, as the tokenizer gives them."""
        self._check(text)
        return (self._tokenizer.encode_with_controls(text) if len(text) <= _LONG else
                self._tokenizer.encode_aside(text, controls=True))

    def _check(self, text: str) -> None:
        if len(text) > _SHORT * self._most and self._characters is not None:
            least = -(-len(text) // self._characters)
            if least > self._most:
                raise ConfigError(f"the prompt has {len(text)} characters, which are {least} tokens or more, and the "
                                  f"context {self._most}: shorten it, or raise max_length (--max-length)")
