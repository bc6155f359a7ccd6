"""Requests to tokens: continuous batching over the slots of the cache, in lockstep on all ranks.

    engine.add("a", [1, 22557], SamplingParams(max_tokens=8))     # rank 0
    while engine.has_work:
        for event in engine.step(): ...                           # every rank; the same events on each

Every rank calls `step` as often as rank 0 does. Inside of `step`, rank 0 broadcasts what was added and cancelled since
the last one (8 bytes where there is nothing, over gloo: the control group); from then on all ranks hold the same
requests and decide alike, without asking one another. One exchange of the new tokens ends the step.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.inference.parameters import Event, SamplingParams
from megatron_mixtral.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megatron_mixtral.model import MixtralModel


class Engine:
    """The lockstep engine over one model, which `Generator` makes.

    `max_slots` is the number of continuations at a time of each data-parallel replica, `max_length` the number of
    tokens of one, prompt included. `stop_token_ids` are the model's own.
    """

    max_slots: int
    max_length: int
    stop_token_ids: frozenset[int]

    def __init__(self, model: "MixtralModel", layout: ParallelLayout, tokenizer: Tokenizer | None, *, max_slots: int,
                 max_length: int, stop_token_ids: frozenset[int], prompt_chunk: int = 512,
                 silence: float = 1800.0) -> None:
        """`prompt_chunk` is the most tokens of prompts in one step: a long prompt is read in several, between which the
        others go on. `silence` is the number of seconds that a rank waits for another one, which rank 0 breaks by a
        `step` even if there is nothing to do.
        """

    def add(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Take a request; on rank 0 only, from any thread. It starts in a later `step`, where a slot is free, first
        come first served.

        `ConfigError`, and nothing is taken, for a prompt that is empty, that leaves no room for a new token, or that
        holds ids outside of the vocabulary, and for a `request_id` that is in use.
        """

    def cancel(self, request_id: str) -> None:
        """End a request, waiting or running; on rank 0 only, from any thread. Its continuations give a last event
        ("cancelled") in the next `step`, and their slots are free. One that is not there, or no more, is no error.
        """

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs. On rank 0 also one that was added since the last step."""

    @property
    def running(self) -> int:
        """Continuations that hold a slot."""

    @property
    def waiting(self) -> int:
        """Continuations that wait for a slot."""

    @property
    def slots(self) -> int:
        """Slots over all data-parallel replicas."""

    def step(self) -> list[Event]:
        """One pass over the model: the next token of every running continuation, and the next part of prompts.

        Every rank calls it, and gets the same events. Without work it only tells the other ranks that rank 0 is there.
        `RankLostError` where another rank has ended, or rank 0 was silent for too long.
        """

    def follow(self) -> None:
        """What every rank but 0 does while rank 0 serves: `step` until rank 0 closes."""

    def close(self) -> None:
        """Rank 0: end the `follow` of the other ranks. Running requests are forgotten. Elsewhere it does nothing."""
