"""One continuation of one prompt: what was read of it, what was written, and its text.

All of it follows from the tokens, so every rank keeps the same continuations without asking another one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_mixtral.inference.parameters import Event, FinishReason, SamplingParams, TokenLogprobs

NOT_FINITE = ("the model's logits are not finite: its weights, or the sums of its 16-bit type, are too large; try "
              "bfloat16 or float32")
BROKEN = "\ufffd"  # what decoders give for bytes that are no whole character
_CONTEXT = 8  # tokens of the prompt with which the first new ones are decoded, for the space between them
_LONGEST = 4  # bytes of a character, each of which may be a token of its own


class TextStream:
    """Token ids to text, piece by piece. Tokens are decoded together with some before them, as the space in front of a
    word depends on these, and only whole characters come out. Text that may begin a stop text waits.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._decode, self._stop = decode, stop
        self._ids, self._shown = self._context(prompt_ids)  # ids[:shown] are context, the others are not text yet
        self._held = ""  # text that may begin a stop text
        self.matched: str | None = None  # the stop text that was found

    def _context(self, prompt_ids: Sequence[int]) -> tuple[list[int], int]:
        """(the last ids of the prompt, how many of them are context), which neither begins nor ends inside of a
        character: the rest of one that the prompt left unfinished belongs to the new text.
        """
        ids = list(prompt_ids[-_CONTEXT:])
        for end in range(len(ids), max(len(ids) - _LONGEST, -1), -1):
            for begin in range(min(_LONGEST, end + 1)):
                text = self._decode(ids[begin:end])
                if not text.startswith(BROKEN) and not text.endswith(BROKEN):
                    return ids[begin:], end - begin
        return [], 0

    def push(self, token_id: int) -> str:
        """The text that is now certain. With a stop text it ends before it, and `matched` says which."""
        self._ids.append(token_id)
        fresh = self._fresh()
        if not fresh or (fresh.endswith(BROKEN) and len(self._ids) - self._shown < 2 * _LONGEST):
            return ""
        self._ids, self._shown = self._ids[self._shown:], len(self._ids) - self._shown
        return self._certain(fresh)

    def finish(self) -> str:
        """What still waited, at the end; bytes of a character that did not become whole are left out."""
        text = self._certain(self._fresh().rstrip(BROKEN))
        if self.matched is None:
            text += self._held
        return text

    def _fresh(self) -> str:
        context = self._decode(self._ids[:self._shown])
        return self._decode(self._ids)[len(context):]

    def _certain(self, fresh: str) -> str:
        text = self._held + fresh
        places = [(place, stop) for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            place, self.matched = min(places)
            return text[:place]
        longest = max((length for stop in self._stop for length in range(min(len(stop) - 1, len(text)), 0, -1)
                       if text.endswith(stop[:length])), default=0)
        self._held = text[len(text) - longest:]
        return text[:len(text) - longest]


@dataclass(eq=False)
class Continuation:
    """The state of one continuation, from its request to its last event."""

    request_id: str
    index: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    stop_ids: frozenset[int]
    max_length: int
    stream: TextStream | None = None  # None: there is no tokenizer, and no text
    slot: int = -1  # of the cache, while it runs
    read: int = 0  # tokens whose keys and values the cache holds
    ids: list[int] = field(default_factory=list)  # written

    def unread(self, most: int) -> Sequence[int]:
        """The next tokens to read: of the prompt at most so many, then the last one written."""
        if self.read >= len(self.prompt_ids):
            return self.ids[-1:]
        return self.prompt_ids[self.read:self.read + most]

    def wanted(self, count: int) -> range:
        """Which of the next `count` tokens to read are followed by something new: the last, once the prompt is read."""
        return range(count - 1 if self.read + count >= len(self.prompt_ids) else count, count)

    def take(self, token_id: int, logprobs: TokenLogprobs | None = None) -> Event:
        """A new token was chosen: its event. A negative id means that the logits were no numbers."""
        if token_id < 0:
            return self.event("", "error", message=NOT_FINITE)
        self.ids.append(token_id)
        new = {"token_ids": (token_id,), "logprobs": () if logprobs is None else (logprobs,)}
        if token_id in self.stop_ids:
            return self.event(self._rest(), "stop", stop_reason=token_id, **new)
        text = "" if self.stream is None else self.stream.push(token_id)
        if self.stream is not None and self.stream.matched is not None:
            return self.event(text, "stop", stop_reason=self.stream.matched, **new)
        full = len(self.prompt_ids) + len(self.ids) >= self.max_length
        if not full and len(self.ids) != self.params.max_tokens:
            return self.event(text, None, **new)
        text += self._rest()
        if self.stream is not None and self.stream.matched is not None:
            return self.event(text, "stop", stop_reason=self.stream.matched, **new)
        message = None if len(self.ids) == self.params.max_tokens else (
            f"the context is full: {len(self.prompt_ids)} tokens of the prompt + {len(self.ids)} new ones = "
            f"{self.max_length}; raise max_length (--max-length)")
        return self.event(text, "length", message=message, **new)

    def event(self, text: str, finish_reason: FinishReason | None, **fields: object) -> Event:
        """An event of this continuation."""
        return Event(self.request_id, self.index, text=text, finish_reason=finish_reason, **fields)

    def _rest(self) -> str:
        return "" if self.stream is None else self.stream.finish()
