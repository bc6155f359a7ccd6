"""`Generator`: a directory becomes something that writes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.inference.engine import Engine
from megatron_mixtral.inference.parameters import Event, FinishReason, SamplingParams, TokenLogprobs
from megatron_mixtral.tokenizer import Tokenizer

Prompt = str | Sequence[int]


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

    engine: Engine
    tokenizer: Tokenizer | None
    layout: ParallelLayout

    @classmethod
    def from_pretrained(cls, directory: str | Path, layout: ParallelLayout = ParallelLayout(), dtype: Any = None, *,  # noqa: B008 - it is frozen
                        tokenizer: str | Path | None = None, max_slots: int = 8, max_length: int | None = None,
                        prompt_chunk: int = 512, silence: float = 1800.0) -> "Generator":
        """Read a Hugging Face folder, rank directories of any layout or a distributed checkpoint, in any layout.

        `tokenizer` is a directory or file (default: the one in `directory`). `max_length` is the longest context,
        prompt included (default: the model's, at most 4096). The cache's memory is said, and refused where the device
        has less, before anything is loaded. `ConfigError`, with the command to type, where `layout` needs more ranks
        than were started; otherwise errors as in `megatron_mixtral.model.from_pretrained`.
        """

    def encode(self, prompt: str) -> list[int]:
        """The ids of a text, one BOS in front where the tokenizer has one. `ConfigError` without a tokenizer."""

    def generate(self, prompts: Prompt | Sequence[Prompt],
                 params: SamplingParams | Sequence[SamplingParams] = SamplingParams()) -> list[Completion]:  # noqa: B008 - it is frozen
        """Continue every prompt: a text, or ids that are taken as they are (with their BOS). `params` are for all of
        them, or one for each. In the order of the prompts, the n of each together. `ConfigError` before the first
        token for a prompt that does not fit.
        """

    def stream(self, prompt: Prompt, params: SamplingParams = SamplingParams()) -> Iterator[Event]:  # noqa: B008 - it is frozen
        """The events of one prompt as they come. Leaving the loop early frees the slot."""
