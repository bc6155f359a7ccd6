"""An engine without a model, for tests of what stands on top of one: the surface of `inference.Engine`, and answers
that depend on the prompt and the request alone. It checks what it is asked as the real one does, and counts slots.
"""

import random
import threading
from collections.abc import Sequence
from types import SimpleNamespace

from megatron_mixtral.errors import ConfigError
from megatron_mixtral.inference import Event, SamplingParams, TokenLogprobs
from megatron_mixtral.tokenizer import Tokenizer

WORDS = ("Mixture", " of", " experts", "\U0001f600", " \u4f60\u597d", "\U0001f468\u200d\U0001f469", " caf\u00e9", "\n",
         "<b>&amp;", " end")


class FakeEngine:
    """One token, which is a word, for each running continuation a step. Holds still while `gate` is not set."""

    def __init__(self, slots: int = 4, max_length: int = 64) -> None:
        self.slots, self.max_length, self.gate = slots, max_length, threading.Event()
        self.gate.set()
        self.fails: Exception | None = None
        self.steps, self.closed, self._lock = 0, False, threading.Lock()
        self._waiting: list[dict] = []
        self._running: list[dict] = []
        self._cancelled: set[str] = set()

    def add(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        if not 0 < len(prompt_ids) < self.max_length:
            raise ConfigError(f"the prompt has {len(prompt_ids)} tokens, and the context {self.max_length}")
        if not all(0 <= number < 32000 for number in prompt_ids):
            raise ConfigError("the prompt has ids outside of the vocabulary")
        with self._lock:
            for index in range(params.n):
                key = params.seed if params.temperature else 0
                chance = random.Random(f"{list(prompt_ids)} {key} {index}" if key is not None else None)
                self._waiting.append({"id": request_id, "index": index, "params": params, "chance": chance,
                                      "room": self.max_length - len(prompt_ids), "said": "", "tokens": 0})

    def cancel(self, request_id: str) -> None:
        self._cancelled.add(request_id)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def step(self) -> list[Event]:
        self.steps += 1
        if self.fails is not None:
            raise self.fails
        self.gate.wait(0.01)
        events = []
        with self._lock:
            gone = self._cancelled
            self._cancelled = set()
            for group in (self._running, self._waiting):
                for one in [one for one in group if one["id"] in gone]:
                    group.remove(one)
                    events.append(Event(one["id"], one["index"], finish_reason="cancelled", message="cancelled"))
            if self.gate.is_set():
                while self._waiting and len(self._running) < self.slots:
                    self._running.append(self._waiting.pop(0))
                events += [self._next(one) for one in self._running]
                ended = {(event.request_id, event.index) for event in events if event.finish_reason}
                self._running = [one for one in self._running if (one["id"], one["index"]) not in ended]
        return events

    def _next(self, one: dict) -> Event:
        word = one["chance"].randrange(len(WORDS))
        one["tokens"] += 1
        text, params, reason, why = WORDS[word], one["params"], None, None
        stop = next((stop for stop in params.stop if stop in text), None)
        if 300 + word in params.stop_token_ids:
            text, reason, why = "", "stop", 300 + word
        elif stop is not None:
            text, reason, why = text[:text.index(stop)], "stop", stop
        elif one["tokens"] >= min(params.max_tokens or one["room"], one["room"]):
            reason = "length"
        found = [TokenLogprobs(300 + word, -0.5, tuple((300 + other, -0.5 - other) for other in range(params.logprobs)))
                 ] if params.logprobs is not None else []
        return Event(one["id"], one["index"], (300 + word,), text, tuple(found), reason, why)

    def follow(self) -> None:
        raise AssertionError("there is one rank")

    def close(self) -> None:
        self.closed = True


def fake_generator(tokenizer: Tokenizer, **options: int) -> SimpleNamespace:
    """What the server takes of a `Generator`."""
    return SimpleNamespace(engine=FakeEngine(**options), tokenizer=tokenizer,
                           encode=lambda text: [tokenizer.bos_id, *tokenizer.encode(text)])

