"""Requests to tokens: continuous batching over the slots of the cache, in lockstep on all ranks.

    engine.add("a", [1, 22557], SamplingParams(max_tokens=8))     # rank 0
    while engine.has_work:
        for event in engine.step(): ...                           # every rank; the same events on each

Every rank calls `step` as often as rank 0 does. Inside of `step`, rank 0 broadcasts what was added and cancelled since
the last one (8 bytes where there is nothing, over gloo: `lockstep.py`); from then on all ranks hold the same requests
and decide alike, without asking one another. One exchange of the new tokens ends the step.

Data-parallel replicas share the requests. Those that share experts too pass over the model together, whatever they have
to read; one that has nothing reads a token of padding.

A request with `ScoringParams` is scored, not continued, and begins with what a slot holds of its tokens (`scoring.py`).
Of a model with adapters a step is two passes where some requests want them and some do not.
"""

import dataclasses
import secrets
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.inference.cache import Row
from megatron_mixtral.inference.continuation import Continuation, TextStream
from megatron_mixtral.inference.lockstep import Lockstep, others_needed
from megatron_mixtral.inference.parameters import Event, SamplingParams, ScoringParams, TokenLogprobs
from megatron_mixtral.inference.sampling import choose, generator_of, logprobs_of, scores_of
from megatron_mixtral.inference.scoring import Held, Scoring, place
from megatron_mixtral.inference.stage import Stage, cache_of
from megatron_mixtral.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megatron_mixtral.model import MixtralModel


class _Part(NamedTuple):
    """What a step reads of one continuation; `wanted` are the places of those tokens whose logits are looked at."""

    continuation: Continuation | Scoring
    token_ids: Sequence[int]
    wanted: range
    targets: Sequence[Sequence[int]] = ((0,),)  # of a scoring, for each wanted place

    @property
    def rows(self) -> int:
        """How many results follow from it."""
        return sum(map(len, self.targets)) if self.wanted else 0


class Engine:
    """The lockstep engine over one model, which `Generator` makes.

    `max_slots` is the number of continuations at a time of each data-parallel replica, `max_length` the number of
    tokens of one, prompt included. `stop_token_ids` are the model's own.
    """

    def __init__(self, model: "MixtralModel", layout: ParallelLayout, tokenizer: Tokenizer | None, *, max_slots: int,
                 max_length: int, stop_token_ids: frozenset[int], prompt_chunk: int = 512,
                 silence: float = 1800.0) -> None:
        """`prompt_chunk` is the most tokens of prompts in one step: a long prompt is read in several, between which the
        others go on. `silence` is the number of seconds that a rank waits for another one, which rank 0 breaks by a
        `step` even if there is nothing to do. Allocates the cache.
        """
        self.max_slots, self.max_length, self.prompt_chunk = max_slots, max_length, prompt_chunk
        self.stop_token_ids, self.tokenizer, self.vocab_size = stop_token_ids, tokenizer, model.mixtral.vocab_size
        self._stage = Stage(model, cache_of(model, max_slots, max_length), prompt_chunk + max_slots, max_length)
        groups = model.pg_collection
        self._replica, replicas = groups.dp.rank(), groups.dp.size()
        self._speaks = model.post_process and groups.tp.rank() == 0  # for its replica: it samples
        self._together = layout.ep > 1 or layout.etp != layout.tp  # whether replicas share experts
        self._lockstep = Lockstep(silence)
        self._waiting: deque[Continuation | Scoring] = deque()
        self._running: list[dict[int, Continuation | Scoring]] = [{} for _ in range(replicas)]  # a replica's, by slot
        self._held: list[dict[int, Held]] = [{} for _ in range(replicas)]  # by free slots
        self.tokens_read = self.tokens_kept = 0  # by the model; found in a slot. Of all replicas
        self._random: dict[Continuation, torch.Generator | None] = {}  # of this replica's, where this rank samples
        self._commands: list[Any] = []  # of rank 0, for the next step
        self._open: Counter[str] = Counter()  # continuations of each request that have not ended; rank 0 only
        self._guard = threading.Lock()
        self._closed, self._in_step, self._following = False, False, False

    # -- Requests --------------------------------------------------------------------------------------

    def add(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams | ScoringParams) -> None:
        """Take a request; on rank 0 only, from any thread. It starts in a later `step`, where a slot is free, first
        come first served.

        `ConfigError`, and nothing is taken, for a prompt that is empty, that leaves no room for a new token, or that
        holds ids outside of the vocabulary, and for a `request_id` that is in use.
        """
        self.check(prompt_ids, params)
        if not params.greedy and params.seed is None:
            params = dataclasses.replace(params, seed=secrets.randbits(63))  # here, so that all ranks have the same
        with self._guard:
            if self._open[request_id]:
                raise ConfigError(f"request {request_id!r} is under way: give another name")
            self._open[request_id] = params.n
            self._commands.append(("add", request_id, tuple(prompt_ids), params))

    def check(self, prompt_ids: Sequence[int], params: SamplingParams | ScoringParams) -> None:
        """`ConfigError` for a request that `add` would not take."""
        if not prompt_ids:
            raise ConfigError("the prompt is empty: give at least one token")
        if isinstance(params, ScoringParams):
            given = [one for targets in params.targets for one in targets]
            if len(prompt_ids) > self.max_length or len(params.targets) > len(prompt_ids):
                raise ConfigError(f"{len(params.targets)} places of {len(prompt_ids)} tokens are to be scored, in a "
                                  f"context of {self.max_length}: shorten the text, or raise max_length (--max-length)")
        else:
            given = params.stop_token_ids
        if isinstance(params, SamplingParams) and len(prompt_ids) >= self.max_length:
            raise ConfigError(f"the prompt has {len(prompt_ids)} tokens, and the context {self.max_length}, of which "
                              "one at least has to be free: shorten it, or raise max_length (--max-length)")
        wrong = next((one for one in (*prompt_ids, *given) if not 0 <= one < self.vocab_size), None)
        if wrong is not None:
            raise ConfigError(f"token id {wrong} is not one of the model's {self.vocab_size}")
        if params.stop and self.tokenizer is None:
            raise ConfigError("stop texts need a tokenizer: give one (--tokenizer-model), or stop_token_ids")

    def cancel(self, request_id: str) -> None:
        """End a request, waiting or running; on rank 0 only, from any thread. Its continuations give a last event
        ("cancelled") in the next `step`, and their slots are free. One that is not there, or no more, is no error.
        """
        with self._guard:
            if self._open[request_id]:
                self._commands.append(("cancel", request_id))

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which takes the requests."""
        return self._lockstep.rank == 0

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs. On rank 0 also one that was added since the last step."""
        return bool(self._waiting or any(self._running) or self._commands)

    @property
    def running(self) -> int:
        """Continuations that hold a slot."""
        return sum(map(len, self._running))

    @property
    def waiting(self) -> int:
        """Continuations that wait for a slot."""
        return len(self._waiting)

    @property
    def slots(self) -> int:
        """Slots over all data-parallel replicas."""
        return self.max_slots * len(self._running)

    # -- Steps -----------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """A pass over the model: the next token of every running continuation, and the next part of prompts.

        Every rank calls it, and gets the same events. Without work it only tells the other ranks that rank 0 is there.
        `RankLostError` where another rank has ended, or rank 0 was silent for too long.
        """
        if self._closed:
            raise ConfigError("the engine is closed: make another Generator")
        with self._guard:
            commands, self._commands = self._commands, []
        self._in_step, events = True, []
        for name, *arguments in self._lockstep.tell(commands):
            events += getattr(self, f"_{name}")(*arguments)
        self._admit()
        for adapter in (True, False):
            plans = [list(self._plan(running, adapter)) for running in self._running]
            if any(plans):
                with others_needed():
                    due = plans[self._replica] or self._together
                    logits = self._read(plans[self._replica], adapter) if due else None
                events += self._take(plans, logits)
        with self._guard:
            for event in events:
                if event.finish_reason is not None:
                    self._open[event.request_id] -= 1
            self._open += Counter()  # forgets those at zero
        if not self._waiting and not self.running:
            for held in self._held:
                held.clear()  # the next request may meet other weights: a model in training
        self._in_step = False
        return events

    def follow(self) -> None:
        """What every rank but 0 does while rank 0 serves: `step` until rank 0 closes, or has no more to ask for now."""
        self._following = not self._closed
        while self._following:
            self.step()

    def rest(self) -> None:
        """Rank 0: end the `follow` of the other ranks, who may follow again later. Else as `close`. Whoever has led
        alone goes on doing so: by then its requests have other names than those of a rank that asks the same.
        """
        if self.is_first and not self._closed and not self._in_step:
            self._lockstep.tell([("rest",)])

    def close(self) -> None:
        """Rank 0: end the `follow` of the other ranks. Running requests are forgotten. Elsewhere it does nothing, nor
        after a step that failed: there the others wait for what will not come, and learn it when this process ends.
        """
        if self.is_first and not self._closed and not self._in_step:
            self._lockstep.tell([("close",)])
            self._closed = True

    # -- The same on every rank ----------------------------------------------------------------------------

    def _add(self, request_id: str, prompt_ids: tuple[int, ...], params: SamplingParams | ScoringParams) -> list[Event]:
        if isinstance(params, ScoringParams):
            self._waiting.append(Scoring(request_id, prompt_ids, params))
            return []
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.stop_token_ids)
        for index in range(params.n):
            stream = None if self.tokenizer is None else TextStream(self._decode, prompt_ids, params.stop)
            self._waiting.append(Continuation(request_id, index, prompt_ids, params, stop_ids, self.max_length, stream))
        return []

    def _cancel(self, request_id: str) -> list[Event]:
        ended = [one for one in self._waiting if one.request_id == request_id]
        self._waiting = deque(one for one in self._waiting if one.request_id != request_id)
        for running in self._running:
            ended += [one for one in running.values() if one.request_id == request_id]
        for one in ended:
            self._release(one)
        return [one.event("", "cancelled") for one in sorted(ended, key=lambda one: one.index)]

    def _rest(self) -> list[Event]:
        self._following = False
        return []

    def _close(self) -> list[Event]:
        self._closed, self._following = True, False
        self._waiting.clear()
        for running in self._running:
            running.clear()
        return []

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode([one for one in ids if one < self.tokenizer.vocab_size])

    def _admit(self) -> None:
        """Give the free slots to those that wait: the lowest of the replica that has most."""
        while self._waiting:
            replica = min(range(len(self._running)), key=lambda one: len(self._running[one]))
            running, held, one = self._running[replica], self._held[replica], self._waiting[0]
            if len(running) == self.max_slots:
                return
            one.slot = next(slot for slot in range(self.max_slots) if slot not in running)
            if isinstance(one, Scoring):
                found = place(one, running, held)
                if found is None:
                    return  # what it shares with another one is being read: it waits for it
                self._begin_with(one, replica, *found)
            elif self._speaks and replica == self._replica:
                self._random[one] = generator_of(one.params, one.index)
            held.pop(one.slot, None)
            running[one.slot] = self._waiting.popleft()

    def _begin_with(self, one: Scoring, replica: int, source: int, count: int) -> None:
        """The first tokens of a scoring are in the slot `source`: it goes on there if it is free, or has a copy."""
        if count and source in self._held[replica]:
            one.slot = source
        elif count and replica == self._replica:
            self._stage.cache.copy(source, one.slot, count)
        one.read = count
        self.tokens_kept += count

    def _plan(self, running: dict[int, Continuation | Scoring], adapter: bool) -> Iterator[_Part]:
        """What a replica reads with adapters, or without: every last token, and of the prompts, in the order of their
        coming, a chunk.
        """
        left = self.prompt_chunk
        for one in [each for each in running.values() if each.params.adapter is adapter]:
            token_ids = one.unread(left)
            if one.read < len(one.prompt_ids):
                left -= len(token_ids)
            if token_ids:
                wanted = one.wanted(len(token_ids))
                targets = (one.targets(wanted),) if isinstance(one, Scoring) else ()
                yield _Part(one, token_ids, wanted, *targets)

    def _read(self, parts: Sequence[_Part], adapter: bool) -> torch.Tensor | None:
        rows = [Row(part.continuation.slot, part.continuation.read, len(part.token_ids)) for part in parts]
        token_ids = [one for part in parts for one in part.token_ids]
        ends, wanted = 0, []
        for part in parts:
            wanted += [ends + place for place in part.wanted]
            ends += len(part.token_ids)
        return self._stage.read(rows, token_ids, wanted, adapter)

    def _take(self, plans: Sequence[Sequence[_Part]], logits: torch.Tensor | None) -> list[Event]:
        """Choose, tell one another, and let every continuation take its token."""
        due = [[part for part in parts if part.wanted] for parts in plans]
        for part in (part for parts in plans for part in parts):
            part.continuation.read += len(part.token_ids)
            self.tokens_read += len(part.token_ids)
        mine = self._choose(due[self._replica], logits) if self._speaks else None
        top = max((part.continuation.params.logprobs or 0 for parts in due for part in parts), default=0)
        counts = [sum(part.rows for part in parts) for parts in due]
        events = []
        for parts, chosen in zip(due, map(iter, self._lockstep.share(counts, top, mine, self._replica)), strict=True):
            for one, found in ((part.continuation, list(islice(chosen, part.rows))) for part in parts):
                if isinstance(one, Scoring):
                    event = one.take(found)
                else:
                    event = one.take(found[0].token_id, None if one.params.logprobs is None else found[0])
                events.append(event)
                if event.finish_reason is not None:
                    self._release(one, keep=event.finish_reason != "error")
        return [event for event in events if event.finish_reason is not None or event.token_ids]

    def _release(self, one: Continuation | Scoring, keep: bool = True) -> None:
        """Free its slot, which goes on holding what was read, for a scoring that begins alike."""
        for running, held in zip(self._running, self._held, strict=True):
            if running.get(one.slot) is one:
                del running[one.slot]
                if keep:
                    held[one.slot] = Held((*one.prompt_ids, *one.ids)[:one.read], one.params.adapter)
        self._random.pop(one, None)

    def _choose(self, parts: Sequence[_Part], logits: torch.Tensor | None) -> list[TokenLogprobs]:
        """This replica's tokens, and the scores of its scorings; -1 where the logits are no numbers."""
        if not parts:
            return []
        finite, found, end = logits.isfinite().all(-1).tolist(), [], 0
        for part in parts:
            begin, end, one = end, end + len(part.wanted), part.continuation
            if not all(finite[begin:end]):
                found += [TokenLogprobs(-1, 0.0)] * part.rows
            elif isinstance(one, Scoring):
                found += scores_of(logits[begin:end], part.targets)
            else:
                token_id = choose(logits[begin], one.params, (*one.prompt_ids, *one.ids), self._random[one])
                found.append(TokenLogprobs(token_id, 0.0) if one.params.logprobs is None else
                             logprobs_of(logits[begin], token_id, one.params.logprobs))
        return found
