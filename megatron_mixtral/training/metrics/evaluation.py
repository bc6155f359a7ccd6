"""What the model makes of the same prompts as it learns (`--evaluation-prompts`), and of questions (`--eval-tasks`).

The model in training reads them itself, in the run's own layout, through `inference`: nothing of the run is drawn on,
neither data nor random numbers, so its losses are the same with them and without, bit for bit.
`training/metrics/hooks.py` calls it on every rank.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mixtral.config import MixtralConfig
from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.inference import Completion, Generator, SamplingParams, cli
from megatron_mixtral.planning import CacheShape
from megatron_mixtral.runtime import launch
from megatron_mixtral.tokenizer import Tokenizer, load_tokenizer
from megatron_mixtral.training.metrics import questions
from megatron_mixtral.training.metrics.questions import Questions

if TYPE_CHECKING:
    from megatron_mixtral.training.arguments import Run

logger = logging.getLogger(__name__)

MAX_TOKENS, MAX_SLOTS = 64, 8


@dataclass(frozen=True)
class Plan:
    """What a run's model is asked, ready to be read: ids and settings of each prompt, and questions; every how many
    steps, with which tokenizer.
    """

    ids: list[list[int]]
    params: list[SamplingParams]
    questions: Questions | None
    interval: int | None
    tokenizer: Tokenizer

    @property
    def longest(self) -> int:
        """Tokens that the longest prompt and its continuation take together."""
        return max((len(ids) + (one.max_tokens or MAX_TOKENS)
                    for ids, one in zip(self.ids, self.params, strict=True)), default=0)

    def cache(self, config: MixtralConfig) -> CacheShape:
        """What it takes to ask: it stays allocated."""
        slots = MAX_SLOTS if self.questions is not None else min(MAX_SLOTS, len(self.ids))
        length = max(self.longest + 1, 0 if self.questions is None else self.questions.length)
        return CacheShape(slots, min(length, config.max_position_embeddings + 1))


def check(run: "Run") -> str | None:
    """The flag that asks for evaluations, `--evaluation-prompts` or `--eval-tasks`; None without both. Reads no file.

    `ConfigError` for flags that need one of them, and for a run that cannot do it.
    """
    flags, given = run.flags, run.engine
    asks = next((flag for flag, value in (("--evaluation-prompts", flags.evaluation_prompts),
                                          ("--eval-tasks", flags.eval_tasks)) if value is not None), None)
    for name, there, needs in (
            ("evaluation_interval", asks, "--evaluation-prompts FILE or --eval-tasks NAMES"),
            ("eval_data_path", flags.eval_tasks, "--eval-tasks mmlu"),
            ("eval_include_path", flags.eval_tasks, "--eval-tasks NAMES"),
            ("eval_limit", flags.eval_tasks, "--eval-tasks NAMES")):
        if getattr(flags, name) is not None and there is None:
            raise ConfigError(f"--{name.replace('_', '-')} needs {needs}")
    if asks is None:
        return None
    if flags.evaluation_interval is not None and flags.evaluation_interval < 1:
        raise ConfigError(f"--evaluation-interval {flags.evaluation_interval}: expected a number of steps, at least 1")
    for size, flag in ((run.layout.vpp > 1, "virtual pipeline stages"), (run.layout.cp > 1, "context parallelism"),
                       (given.overlap_param_gather, "--overlap-param-gather")):
        if size:
            raise ConfigError(f"{asks} does not go with {flag}: leave one of them out")
    if not (given.tokenizer_model or flags.tokenizer_name_or_path):
        raise ConfigError(f"{asks} needs the tokenizer of the data: --tokenizer-model DIR")
    return asks


def read(run: "Run") -> Plan | None:
    """What `--evaluation-prompts` and `--eval-tasks` say, before the run starts; None without both. Imports no torch.

    `ConfigError` or `DataError` for what cannot be read, does not fit the model, or a run that cannot do it.
    """
    if check(run) is None:
        return None
    flags = run.flags
    tokenizer = load_tokenizer("HuggingFaceTokenizer", run.engine.tokenizer_model or flags.tokenizer_name_or_path)
    ids, params = ([], []) if flags.evaluation_prompts is None else _read_prompts(run, tokenizer)
    return Plan(ids, params, questions.read(run, tokenizer), flags.evaluation_interval, tokenizer)


def check_names(plan: Plan | None) -> None:
    """`ConfigError` for a task in `--eval-tasks` that there is none of. Imports lm-eval, and with it torch."""
    if plan is not None and plan.questions is not None and plan.questions.names:
        from megatron_mixtral.evaluation import check_names

        check_names(plan.questions.names, plan.questions.include)


def begin(plan: Plan | None, run: "Run") -> "Evaluation | None":
    """What asks the run's model, before that is built. Rank 0 also looks whether there are the tasks: it will ask."""
    if launch.is_first_here():
        check_names(plan)
    return None if plan is None else Evaluation(plan, run)


def _read_prompts(run: "Run", tokenizer: Tokenizer) -> tuple[list[list[int]], list[SamplingParams]]:
    prompts, params = cli.read_prompts(Path(run.flags.evaluation_prompts), SamplingParams(max_tokens=MAX_TOKENS))
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = [begin + tokenizer.encode(one) if isinstance(one, str) else list(one) for one in prompts]
    needed, largest = Plan(ids, params, None, None, tokenizer).longest, max(max(one, default=0) for one in ids)
    if needed > (most := run.config.max_position_embeddings):
        raise ConfigError(f"--evaluation-prompts: the longest prompt and its continuation take {needed} tokens, "
                          f"and the model's context has {most}")
    if largest >= run.config.vocab_size:
        raise ConfigError(f"--evaluation-prompts: token id {largest} is not one of the model's "
                          f"{run.config.vocab_size}; is {tokenizer.path} its tokenizer?")
    return ids, params


class Evaluation:
    """Asks a run's model; `watch` gives it the model, before anything else."""

    folder: Path | None = None  # of the files of the answers, if there are to be any

    def __init__(self, plan: Plan, run: "Run") -> None:
        self._plan, self._run = plan, run
        self._model: Any = None
        self._generator: Generator | None = None

    def watch(self, model: Any) -> None:
        """This rank's stage of the model, which is the same object in all of the run."""
        self._model = model

    def due(self, iteration: int, last: int | None) -> bool:
        """Whether the model is to be asked after this step."""
        return iteration == last or (self._plan.interval is not None and iteration % self._plan.interval == 0)

    def after(self, iteration: int) -> dict[str, float]:
        """Ask the model as it is after step `iteration`; every rank calls it, the last writes. Returns the figures of
        the questions, by the names under which metrics have them.
        """
        import torch

        if self._generator is None:
            self._generator = self._make()
        training = self._model.training
        self._model.eval()
        try:
            texts, answers = self._lead_or_follow(iteration)
        finally:
            self._model.train(training)
        figures = questions.figures(answers)
        if self._run.ranks.world == 1 + torch.distributed.get_rank():
            self._write_texts(iteration, texts)
            if answers:
                self._write_figures(iteration, answers, figures)
        return figures

    def _lead_or_follow(self, iteration: int) -> tuple[list[tuple[int, Completion]], dict[str, Any]]:
        """The texts of the prompts and lm-eval's results, on every rank: rank 0 asks and the others follow."""
        import torch

        engine, found = self._generator.engine, [([], {})]
        if engine.is_first:
            try:
                texts = list(self._generator.completions(self._plan.ids, self._plan.params))
                found = [(texts, self._ask(iteration))]
            finally:
                engine.rest()
        else:
            engine.follow()
        torch.distributed.broadcast_object_list(found)
        return found[0]

    def _ask(self, iteration: int) -> dict[str, Any]:
        if self._plan.questions is None:
            return {}
        try:
            return questions.ask(self._generator, self._plan.questions)
        except DataError as error:  # logits that are no numbers: whether the run goes on is not decided here
            logger.warning("step %d: --eval-tasks could not be asked: %s", iteration, error)
            return {}

    def _make(self) -> Generator:
        from megatron_mixtral.inference import Engine  # imports the engine

        plan, cache = self._plan, self._plan.cache(self._run.config)
        engine = Engine(self._model, self._run.layout, plan.tokenizer, max_slots=cache.slots, max_length=cache.length,
                        stop_token_ids=self._stop_ids())
        return Generator(engine, plan.tokenizer)

    def _stop_ids(self) -> frozenset[int]:
        ids = (self._run.config.eos_token_id, self._plan.tokenizer.eos_id)
        return frozenset(one for one in ids if one is not None)

    def _write_texts(self, iteration: int, found: list[tuple[int, Completion]]) -> None:
        from megatron.training import get_tensorboard_writer

        writer, lines = get_tensorboard_writer(), []
        for place, one in found:
            prompt = self._plan.tokenizer.decode(self._plan.ids[place])
            logger.info("step %d | %s -> %s", iteration, json.dumps(prompt, ensure_ascii=False),
                        json.dumps(one.text, ensure_ascii=False))
            lines.append({"iteration": iteration, "prompt": prompt, "text": one.text, "token_ids": one.token_ids,
                          "finish_reason": one.finish_reason})
            if writer is not None:
                writer.add_text(f"evaluation/{place}", f"{prompt}**{one.text}**", iteration)
        self._append("evaluation_prompts.jsonl", lines)

    def _write_figures(self, iteration: int, answers: dict[str, Any], figures: dict[str, float]) -> None:
        from megatron.training import get_tensorboard_writer

        writer = get_tensorboard_writer()
        logger.info("step %d | %s", iteration, " | ".join(
            f"{name.removeprefix(questions.PREFIX)} {value:.4f}" for name, value in figures.items()))
        for name, value in figures.items() if writer is not None else ():
            writer.add_scalar(name, value, iteration)
        self._append("evaluation_tasks.jsonl", [{"iteration": iteration} | answers])

    def _append(self, name: str, lines: list[dict[str, Any]]) -> None:
        if self.folder is not None and lines:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
