"""Text during training (`--evaluation-prompts`): what the model makes of the same prompts as it learns.

The model in training reads them itself, in the run's own layout, through `inference`: nothing of the run is drawn on,
neither data nor random numbers, so its losses are the same with the prompts and without, bit for bit.
`training/metrics/hooks.py` calls it on every rank.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mixtral.errors import ConfigError
from megatron_mixtral.inference import Completion, Generator, SamplingParams, cli
from megatron_mixtral.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from megatron_mixtral.training.arguments import Run

logger = logging.getLogger(__name__)

MAX_TOKENS, MAX_SLOTS = 64, 8


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run, ready to be read: ids and settings of each, every how many steps, with which tokenizer."""

    ids: list[list[int]]
    params: list[SamplingParams]
    interval: int | None
    tokenizer: Tokenizer

    @property
    def length(self) -> int:
        """Tokens that the longest prompt and its continuation take together."""
        return max(len(ids) + (one.max_tokens or MAX_TOKENS) for ids, one in zip(self.ids, self.params, strict=True))


def read(run: "Run") -> Prompts | None:
    """The prompts of `--evaluation-prompts`, before the run starts; None without the flag. Imports no torch.

    `ConfigError` or `DataError` for what cannot be read, does not fit the model, or a run that cannot do it.
    """
    flags, given = run.flags, run.engine
    if flags.evaluation_prompts is None:
        if flags.evaluation_interval is not None:
            raise ConfigError("--evaluation-interval needs --evaluation-prompts FILE")
        return None
    if flags.evaluation_interval is not None and flags.evaluation_interval < 1:
        raise ConfigError(f"--evaluation-interval {flags.evaluation_interval}: expected a number of steps, at least 1")
    for size, flag in ((run.layout.vpp > 1, "virtual pipeline stages"), (run.layout.cp > 1, "context parallelism"),
                       (given.overlap_param_gather, "--overlap-param-gather")):
        if size:
            raise ConfigError(f"--evaluation-prompts does not go with {flag}: leave one of them out")
    path = given.tokenizer_model or flags.tokenizer_name_or_path
    if not path:
        raise ConfigError("--evaluation-prompts needs the tokenizer of the data: --tokenizer-model DIR")
    tokenizer = load_tokenizer("HuggingFaceTokenizer", path)
    prompts, params = cli.read_prompts(Path(flags.evaluation_prompts), SamplingParams(max_tokens=MAX_TOKENS))
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = [begin + tokenizer.encode(one) if isinstance(one, str) else list(one) for one in prompts]
    found = Prompts(ids, params, flags.evaluation_interval, tokenizer)
    longest, largest = run.config.max_position_embeddings, max(max(one, default=0) for one in ids)
    if found.length > longest:
        raise ConfigError(f"--evaluation-prompts: the longest prompt and its continuation take {found.length} tokens, "
                          f"and the model's context has {longest}")
    if largest >= run.config.vocab_size:
        raise ConfigError(f"--evaluation-prompts: token id {largest} is not one of the model's "
                          f"{run.config.vocab_size}; is {path} its tokenizer?")
    return found


class Evaluation:
    """Continues a run's prompts; `watch` gives it the model, before anything else."""

    path: Path | None = None  # the file of the answers, if there is to be one

    def __init__(self, prompts: Prompts, run: "Run") -> None:
        self._prompts, self._run = prompts, run
        self._model: Any = None
        self._generator: Generator | None = None

    def watch(self, model: Any) -> None:
        """This rank's stage of the model, which is the same object in all of the run."""
        self._model = model

    def due(self, iteration: int, last: int | None) -> bool:
        """Whether the prompts are to be continued after this step."""
        return iteration == last or (self._prompts.interval is not None and iteration % self._prompts.interval == 0)

    def after(self, iteration: int) -> None:
        """Continue the prompts with the model as it is after step `iteration`; every rank calls it, the last writes."""
        import torch

        if self._generator is None:
            from megatron_mixtral.inference import Engine  # imports the engine

            tokenizer, slots = self._prompts.tokenizer, min(MAX_SLOTS, len(self._prompts.ids))
            engine = Engine(self._model, self._run.layout, tokenizer, max_slots=slots,
                            max_length=self._prompts.length + 1, stop_token_ids=self._stop_ids())
            self._generator = Generator(engine, tokenizer)
        training = self._model.training
        self._model.eval()
        try:
            found = list(self._generator.completions(self._prompts.ids, self._prompts.params))
        finally:
            self._model.train(training)
        if self._run.ranks.world == 1 + torch.distributed.get_rank():
            self._write(iteration, found)

    def _stop_ids(self) -> frozenset[int]:
        ids = (self._run.config.eos_token_id, self._prompts.tokenizer.eos_id)
        return frozenset(one for one in ids if one is not None)

    def _write(self, iteration: int, found: list[tuple[int, Completion]]) -> None:
        from megatron.training import get_tensorboard_writer

        writer, lines = get_tensorboard_writer(), []
        for place, one in found:
            prompt = self._prompts.tokenizer.decode(self._prompts.ids[place])
            logger.info("step %d | %s -> %s", iteration, json.dumps(prompt, ensure_ascii=False),
                        json.dumps(one.text, ensure_ascii=False))
            lines.append({"iteration": iteration, "prompt": prompt, "text": one.text, "token_ids": one.token_ids,
                          "finish_reason": one.finish_reason})
            if writer is not None:
                writer.add_text(f"evaluation/{place}", f"{prompt}**{one.text}**", iteration)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
