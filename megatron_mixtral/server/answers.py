"""The engine's events to OpenAI's objects: chunks of a stream, or one object at the end.

A stream and an answer in one piece are made of the same events, so the chunks, put together, are that answer.
"""

import itertools
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from megatron_mixtral.inference import Event, TokenLogprobs
from megatron_mixtral.server.requests import Asked, Refused
from megatron_mixtral.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no minus infinity


class TokenTexts:
    """A token's text as it stands inside of a text, by its id; bytes that are no whole character give U+FFFD."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        controls = {number: word for word, number in tokenizer.control_tokens().items()}
        before = tokenizer.encode("a")
        length = len(tokenizer.decode(before))
        self.of = cache(lambda number: controls.get(number) or tokenizer.decode([*before, number])[length:])


@dataclass
class Choice:
    """What one continuation has given so far."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    tokens: int = 0
    finish_reason: str | None = None

    def add(self, event: Event, begin: Callable[[str], str]) -> Mapping[str, Any]:
        """Take an event in; `begin` is for the first text. Raises `Refused` for an end that is none of the model's."""
        if event.finish_reason in ("cancelled", "error"):
            raise Refused(503 if event.finish_reason == "cancelled" else 500,
                          event.message or "the server ended before the answer did")
        logprobs = list(event.logprobs)
        if event.finish_reason == "stop" and isinstance(event.stop_reason, int):
            logprobs = logprobs[:-1]  # the stop id itself is no part of the text
        text = event.text if any(self.text) else begin(event.text)
        self.text.append(text)
        self.logprobs += logprobs
        self.tokens += len(event.token_ids)
        self.finish_reason = event.finish_reason
        return {"text": text, "logprobs": logprobs, "finish_reason": event.finish_reason}


class Answer:
    """The objects of one request. `prompt_tokens` are the lengths of its prompts, `begin` what a chat's prompts do to
    the beginning of an answer (a completion goes on from its prompt, and keeps its first space).
    """

    def __init__(self, kind: str, asked: Asked, prompt_tokens: Iterable[int], texts: TokenTexts,
                 begin: Callable[[str], str]) -> None:
        self._chat, self._asked, self._texts = kind == "chat", asked, texts
        self._begin = begin if self._chat else str
        self._prompt_tokens = list(prompt_tokens)
        self.choices = [Choice() for _ in range(len(self._prompt_tokens) * asked.params.n)]
        self._head = {"id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()),
                      "model": asked.model}

    def take(self, prompt: int, event: Event) -> Mapping[str, Any] | None:
        """Take an event of the request's prompt number `prompt`; the chunk that says it, or None if it says nothing."""
        number = prompt * self._asked.params.n + event.index
        first = not self.choices[number].text
        news = self.choices[number].add(event, self._begin)
        if not (first or news["text"] or news["logprobs"] or news["finish_reason"]):
            return None
        if self._chat:
            said = {"delta": ({"role": "assistant"} if first else {}) | {"content": news["text"]}}
        else:
            said = {"text": news["text"]}
        start = sum(map(len, self.choices[number].text[:-1])) if news["logprobs"] and not self._chat else 0
        choice = {"index": number, **said, "logprobs": self._logprobs(news["logprobs"], start),
                  "finish_reason": news["finish_reason"]}
        return self._head | {"object": self._name(".chunk"), "choices": [choice]}

    def usage_chunk(self) -> Mapping[str, Any]:
        """The last chunk of a stream that was asked for the counts of tokens."""
        return self._head | {"object": self._name(".chunk"), "choices": [], "usage": self.usage()}

    def whole(self) -> Mapping[str, Any]:
        """The answer in one piece, once all continuations have ended."""
        choices = []
        for number, choice in enumerate(self.choices):
            text = "".join(choice.text)
            said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {
                "text": text}
            choices.append({"index": number, **said, "logprobs": self._logprobs(choice.logprobs),
                            "finish_reason": choice.finish_reason})
        return self._head | {"object": self._name(""), "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts, each counted once, and of all continuations."""
        given, written = sum(self._prompt_tokens), sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": given, "completion_tokens": written, "total_tokens": given + written}

    def _name(self, chunk: str) -> str:
        return "chat.completion" + chunk if self._chat else "text_completion"

    def _logprobs(self, found: list[TokenLogprobs], start: int = 0) -> Mapping[str, Any] | None:
        """In the form of a chat or, with places in the text from `start` on, of a completion."""
        if self._asked.params.logprobs is None:
            return None
        if self._chat:
            return {"content": [self._entry(one.token_id, one.logprob) | {
                "top_logprobs": [self._entry(*pair) for pair in one.top]} for one in found], "refusal": None}
        words = [self._texts.of(one.token_id) for one in found]
        tops = [{self._texts.of(number): _finite(value) for number, value in one.top} for one in found]
        return {"tokens": words, "token_logprobs": [_finite(one.logprob) for one in found], "top_logprobs": tops,
                "text_offset": list(itertools.accumulate(map(len, words[:-1]), initial=start)) if words else []}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        word = self._texts.of(token_id)
        return {"token": word, "logprob": _finite(logprob),
                "bytes": None if "\ufffd" in word else list(word.encode())}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
