"""One scoring: how probable given tokens are after others. Nothing is written; evaluation is made of it.

Questions of a subject begin with the same examples, and the answers to one with the same question. So a scoring begins
with what a slot already holds of its tokens. Where another one is reading what both begin with, it waits until that is
read. All of it follows from tokens that every rank knows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_mixtral.inference.continuation import NOT_FINITE
from megatron_mixtral.inference.parameters import Event, ScoringParams, TokenLogprobs

_WORTH_WAITING = 16  # tokens: a prompt that shares fewer with one that is being read does not wait for it


@dataclass(eq=False)
class Scoring:
    """The state of one scoring, with the names of a `Continuation`'s."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: ScoringParams
    index: int = 0
    slot: int = -1
    read: int = 0
    ids: tuple[int, ...] = ()  # written: none
    found: list[TokenLogprobs] = field(default_factory=list)

    @property
    def before(self) -> int:
        """Tokens of the prompt before the first place that is scored."""
        return len(self.prompt_ids) - len(self.params.targets)

    def unread(self, most: int) -> Sequence[int]:
        """The next tokens to read, at most so many."""
        return self.prompt_ids[self.read:self.read + most]

    def wanted(self, count: int) -> range:
        """Which of the next `count` tokens to read are places that are scored."""
        return range(min(max(self.before - self.read, 0), count), count)

    def targets(self, wanted: range) -> Sequence[Sequence[int]]:
        """Of each of these places of the next tokens to read."""
        return [self.params.targets[self.read + one - self.before] for one in wanted]

    def take(self, found: Sequence[TokenLogprobs]) -> Event:
        """These are known now; the event of the last ones has all. A negative id means that logits were no numbers."""
        if any(one.token_id < 0 for one in found):
            return self.event("", "error", message=NOT_FINITE)
        self.found += found
        if self.read < len(self.prompt_ids):
            return self.event("", None)
        return self.event("", "scored", logprobs=tuple(self.found))

    def event(self, text: str, finish_reason: Any, **fields: Any) -> Event:
        """An event of this scoring."""
        return Event(self.request_id, self.index, text=text, finish_reason=finish_reason, **fields)


class Held(NamedTuple):
    """What a free slot holds: keys and values of these tokens, read with the adapters or without."""

    ids: tuple[int, ...]
    adapter: bool


def place(one: Scoring, running: Mapping[int, Any], held: Mapping[int, Held]) -> tuple[int, int] | None:
    """(slot that holds most of what the scoring begins with, how many tokens); (-1, 0) where none does. None where it
    is better to wait. `running` and `held` are the continuations in slots, and what free ones hold.
    """
    found, coming = {-1: 0}, 0
    for slot, other in held.items():
        found[slot] = _shared(one, *other)
    for slot, other in running.items():
        count = _shared(one, other.prompt_ids, other.params.adapter)
        found[slot], coming = min(count, other.read), max(coming, count)
    best = max(found, key=found.__getitem__)
    return None if coming - found[best] >= _WORTH_WAITING else (best, found[best])


def _shared(one: Scoring, other: Sequence[int], adapter: bool) -> int:
    """Tokens with which both begin, before the first place that is scored: its logits are not kept."""
    most = min(one.before, len(other)) if adapter is one.params.adapter else 0
    return next((at for at in range(most) if one.prompt_ids[at] != other[at]), most)
