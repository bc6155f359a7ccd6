"""`Generator`: a directory becomes something that writes.

    generator = Generator.from_pretrained("Mixtral-8x7B", layout=ParallelLayout(tp=2), dtype="bfloat16")
    [answer] = generator.generate("The capital of France is", SamplingParams(max_tokens=8))

A layout of several ranks is for a program that was started as so many (torchrun, or a command of this library, which
starts its ranks itself).
"""

import itertools
import logging
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_mixtral import lora, model, runtime
from megatron_mixtral.config import Coord, MixtralConfig, ParallelLayout, read_json
from megatron_mixtral.disk import human_size
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.inference.parameters import Event, FinishReason, SamplingParams, ScoringParams, TokenLogprobs
from megatron_mixtral.tokenizer import LimitedTokenizer, Tokenizer, load_tokenizer
from megatron_mixtral.weights import ShardPlan, open_source

if TYPE_CHECKING:
    from megatron_mixtral.inference.engine import Engine

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]
_ELEMENT_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Completion:
    """One continuation of one prompt, whole. Fields as in `Event`."""

    prompt_ids: tuple[int, ...]
    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    message: str | None = None


class Generator:
    """A model, its tokenizer and an `Engine`. Every rank makes one, and calls its methods with the same arguments."""

    LONGEST: ClassVar[int] = 4096  # tokens of a context, where nothing is said and the model has as many

    def __init__(self, engine: "Engine", tokenizer: Tokenizer | None) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.prompt_tokenizer = tokenizer and LimitedTokenizer(tokenizer, engine.max_length)  # of what has to fit
        self._names = itertools.count()

    @classmethod
    def from_pretrained(cls, directory: str | Path, layout: ParallelLayout = ParallelLayout(), dtype: Any = None, *,  # noqa: B008 - it is frozen
                        adapter: str | Path | None = None, tokenizer: str | Path | None = None, max_slots: int = 8,
                        max_length: int | None = None, prompt_chunk: int = 512, silence: float = 1800.0) -> "Generator":
        """Read a Hugging Face folder, rank directories of any layout or a distributed checkpoint, in any layout.

        `adapter` is a PEFT folder or a checkpoint of adapters of this model, which requests then take, or leave out
        (`SamplingParams.adapter`); beside adapters of a run with --qlora the model is in 4 bits. `tokenizer` is a
        directory or file (default: the one in `directory`). `max_length` is the longest context, prompt included
        (default: the model's, at most 4096). The cache's memory is said, and refused where the device has less, before
        anything is loaded. `ConfigError`, with the command to type, where `layout` needs more ranks than were started;
        otherwise errors as in `from_pretrained` of `megatron_mixtral.model` or `megatron_mixtral.lora`.
        """
        for name, value in {"max_slots": max_slots, "prompt_chunk": prompt_chunk}.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}, expected at least 1")
        if layout.cp > 1:
            raise ConfigError(f"layout {layout}: a continuation is not cut over devices; leave cp out")
        source = open_source(directory, holds="model")
        beside = None if adapter is None else open_source(adapter, base=source.config, holds="adapters").config
        longest = source.config.max_position_embeddings
        max_length = min(longest, cls.LONGEST) if max_length is None else max_length
        if not 2 <= max_length <= longest:
            raise ConfigError(f"max_length is {max_length}, expected 2 to {longest}, the longest context of the model")
        _check_ranks(layout)
        read = _tokenizer(source, tokenizer)
        layout = model.initialize(layout, source.config)
        _check_memory(source.config, beside, layout, model.type_name(dtype, source), max_slots, max_length)
        # Only now, because importing the engine's models looks at the machine.
        from megatron_mixtral.inference.engine import Engine

        ready = (model.from_pretrained(directory, layout, dtype) if adapter is None else
                 lora.from_pretrained(directory, adapter, layout, dtype))
        return cls(Engine(ready, layout, read, max_slots=max_slots, max_length=max_length, prompt_chunk=prompt_chunk,
                          stop_token_ids=stop_ids(source, read), silence=silence), read)

    def encode(self, prompt: str) -> list[int]:
        """The ids of a text, one BOS in front where the tokenizer has one. `ConfigError` without a tokenizer, and for a
        text that is too long for the context whatever its ids are.
        """
        if self.tokenizer is None:
            raise ConfigError("there is no tokenizer in the model's directory, nor was one given (--tokenizer-model): "
                              "give one, or prompts as token ids")
        begin = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return begin + self.prompt_tokenizer.encode(prompt)

    def generate(self, prompts: Prompt | Sequence[Prompt],
                 params: SamplingParams | Sequence[SamplingParams] = SamplingParams()) -> list[Completion]:  # noqa: B008 - it is frozen
        """Continue every prompt: a text, or ids that are taken as they are (with their BOS). `params` are for all of
        them, or one for each. In the order of the prompts, the n of each together. `ConfigError` before the first
        token for a prompt that does not fit.
        """
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ConfigError(f"{len(each)} params for {len(prompts)} prompts: give one, or one for each")
        return [one for _, one in self.completions(prompts, each)]

    def completions(self, prompts: Sequence[Prompt],
                    params: Sequence[SamplingParams | ScoringParams]) -> Iterator[tuple[int, Completion]]:
        """As `generate`, in the same order, each with its prompt's place as soon as it is known. With `ScoringParams` a
        completion has no tokens, and the log-probabilities of the given ones.
        """
        ids = [self._ids(prompt) for prompt in prompts]
        order = deque((place, index) for place, one in enumerate(params) for index in range(one.n))
        events: dict[tuple[int, int], list[Event]] = {one: [] for one in order}
        for place, event in self._events(ids, params):
            events[place, event.index].append(event)
            while order and (news := events[order[0]]) and news[-1].finish_reason is not None:
                yield order[0][0], _completion(ids[order[0][0]], events.pop(order.popleft()))

    def stream(self, prompt: Prompt, params: SamplingParams = SamplingParams()) -> Iterator[Event]:  # noqa: B008 - it is frozen
        """The events of one prompt as they come. Leaving the loop early frees the slot."""
        for _, event in self._events([self._ids(prompt)], [params]):
            yield event

    def _ids(self, prompt: Prompt) -> list[int]:
        return self.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _events(self, ids: Sequence[list[int]],
                params: Sequence[SamplingParams | ScoringParams]) -> Iterator[tuple[int, Event]]:
        """(place of the prompt, event) until all have ended. Every rank checks all of them before rank 0 adds any."""
        for prompt_ids, one in zip(ids, params, strict=True):
            self.engine.check(prompt_ids, one)
        places = {f"generate-{next(self._names)}": place for place in range(len(ids))}
        if self.engine.is_first:
            for name, place in places.items():
                self.engine.add(name, ids[place], params[place])
        left = sum(one.n for one in params)
        try:
            while left:
                for event in self.engine.step():
                    if event.request_id in places:
                        left -= event.finish_reason is not None
                        yield places[event.request_id], event
        finally:
            if left and self.engine.is_first:
                for name in places:
                    self.engine.cancel(name)


def stop_ids(source: Any, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The model's own stop ids: those of its config, its generation_config.json and its tokenizer together."""
    found: set[int | None] = {source.config.eos_token_id, None if tokenizer is None else tokenizer.eos_id}
    for path in (Path(source.where) / "config.json", *source.companions):  # where there may be several
        if path.name in ("config.json", "generation_config.json") and path.is_file():
            eos = read_json(path).get("eos_token_id")
            found.update(eos if isinstance(eos, list) else [eos])
    return frozenset(one for one in found if isinstance(one, int) and 0 <= one < source.config.vocab_size)


def _completion(prompt_ids: Sequence[int], events: Sequence[Event]) -> Completion:
    last = events[-1]
    return Completion(tuple(prompt_ids), last.index, sum((event.token_ids for event in events), ()),
                      "".join(event.text for event in events), sum((event.logprobs for event in events), ()),
                      last.finish_reason, last.stop_reason, last.message)


def _tokenizer(source: Any, given: str | Path | None) -> Tokenizer | None:
    if given is not None:
        return load_tokenizer("HuggingFaceTokenizer", given)
    beside = [path for path in source.companions if path.name in ("tokenizer.json", "tokenizer.model")]
    return load_tokenizer("HuggingFaceTokenizer", beside[0].parent) if beside else None


def _check_ranks(layout: ParallelLayout) -> None:
    if layout.min_world > runtime.join_process_group(runtime.ready()) == 1:
        raise ConfigError(
            f"layout {layout} needs {layout.min_world} ranks, and this program is one process: start it as\n    "
            f"torchrun --nproc-per-node {layout.min_world} {' '.join(sys.argv)}\nThe commands start their ranks "
            "themselves: megatron-mixtral generate --tensor-model-parallel-size N ...")


def _weights(config: MixtralConfig, adapter: Any, layout: ParallelLayout, coord: Coord, size: int) -> float:
    """Bytes of a rank's weights, adapters beside them."""
    own = ShardPlan(config, layout, coord).tensors()
    if adapter is None:
        return size * sum(tensor.elements for tensor in own)
    beside = ShardPlan(adapter, layout, coord).tensors()
    packed = [one for one in own if adapter.quantized and adapter.packs(one.pieces[0].name)]
    saved = (size - adapter.packed_bytes(size)) * sum(tensor.elements for tensor in packed)
    return size * sum(tensor.elements for tensor in (*own, *beside)) - saved


def _check_memory(config: MixtralConfig, adapter: Any, layout: ParallelLayout, dtype: str, slots: int,
                  length: int) -> None:
    """Say what the fullest rank will hold; `ConfigError`, the same on every rank, where one has not as much."""
    import torch

    from megatron_mixtral.inference.cache import cache_bytes

    size = _ELEMENT_SIZES[dtype]
    weights = max(_weights(config, adapter, layout, coord, size) for coord in layout.coords())
    cache = cache_bytes(config, layout, slots, length, size)
    free = torch.tensor(runtime.device_memory(), dtype=torch.int64, device=runtime.current_device())
    torch.distributed.all_reduce(free, op=torch.distributed.ReduceOp.MIN)
    said = (f"each rank holds up to {human_size(weights)} of weights and {human_size(cache)} of cache: {slots} slots x "
            f"{length} tokens in {dtype}")
    if weights + cache > int(free):
        raise ConfigError(f"{said}, together more than the {human_size(int(free))} that a rank has here; lower "
                          "max_slots (--max-slots) or max_length (--max-length), or spread the model over more ranks")
    logger.info("%s", said)
