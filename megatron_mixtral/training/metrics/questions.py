"""The questions of `--eval-tasks`: which they are, and one evaluation of the model in training, as `evaluate` does it.

`training/metrics/evaluation.py` says when, and hands on what comes out.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mixtral.errors import ConfigError
from megatron_mixtral.evaluation import Mmlu, read_mmlu, report
from megatron_mixtral.inference import Generator
from megatron_mixtral.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megatron_mixtral.training.arguments import Run

MAX_LENGTH = 4096
PREFIX = "eval/"


@dataclass(frozen=True)
class Questions:
    """Tasks of lm-eval by name, MMLU of a folder, and what is common to them; `length` is the longest context."""

    names: list[str]
    mmlu: Mmlu | None
    include: Path | None
    limit: int | None
    length: int


def read(run: "Run", tokenizer: Tokenizer) -> Questions | None:
    """What the flags ask for; None where they ask for nothing. `ConfigError` or `DataError` for what cannot be."""
    flags = run.flags
    names = [name for name in (flags.eval_tasks or "").split(",") if name]
    if flags.eval_tasks is None:
        return None
    if not names or (flags.eval_limit is not None and flags.eval_limit < 1):
        raise ConfigError(f"--eval-tasks {flags.eval_tasks!r} --eval-limit {flags.eval_limit}: expected a name at "
                          "least, and a limit of at least 1")
    if find_spec("lm_eval") is None:
        raise ConfigError("--eval-tasks needs lm-eval: pip install 'megatron-mixtral[eval]'")
    if tokenizer.eos_id is None:
        raise ConfigError(f"--eval-tasks asks in text, and the tokenizer {tokenizer.path} has no end of text")
    if tokenizer.vocab_size > run.config.vocab_size:
        raise ConfigError(f"--eval-tasks: the tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens, and the "
                          f"model {run.config.vocab_size}; is it the model's?")
    if flags.eval_data_path is not None and "mmlu" not in names:
        raise ConfigError(f"--eval-data-path {flags.eval_data_path} is of the task mmlu, and --eval-tasks is "
                          f"{flags.eval_tasks}")
    if flags.eval_include_path is not None and not Path(flags.eval_include_path).is_dir():
        raise ConfigError(f"--eval-include-path {flags.eval_include_path} is no folder: expected one of lm-eval's YAML "
                          "files")
    mmlu = None if flags.eval_data_path is None else read_mmlu(flags.eval_data_path)
    return Questions([name for name in names if mmlu is None or name != "mmlu"], mmlu,
                     None if flags.eval_include_path is None else Path(flags.eval_include_path), flags.eval_limit,
                     min(run.config.max_position_embeddings, MAX_LENGTH))


def ask(generator: Generator, questions: Questions) -> dict[str, Any]:
    """lm-eval's `results` and `groups`, as `evaluate` has them. Rank 0 asks, while the others follow."""
    from megatron_mixtral.evaluation import Harness, evaluate

    local = {} if questions.mmlu is None else questions.mmlu.tasks()
    tasks = {**local, **{name: name for name in questions.names}}
    with _random_states_kept():
        parts = evaluate(Harness(generator, questions.length), tasks, None, {}, limit=questions.limit,
                         include=questions.include)
    whole = report.assemble(parts, {}, questions.mmlu is not None)
    return {key: whole[key] for key in ("results", "groups", "group_subtasks", "tokens")}


def figures(answers: Mapping[str, Any]) -> dict[str, float]:
    """`eval/TASK/METRIC` of every group, and of every task that is in none."""
    groups, found = answers.get("groups", {}), {}
    members = {name for names in answers.get("group_subtasks", {}).values() for name in names} - groups.keys()
    for name, results in (groups | answers.get("results", {})).items():
        for key, value in report.figures_of(results).items() if name not in members else ():
            metric, rule = key.split(",")
            found[f"{PREFIX}{name}/{metric}" + ("" if rule == "none" else f"/{rule}")] = float(value)
    return found


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """A task may draw; the run goes on with the numbers that it would have drawn."""
    import numpy as np
    import torch

    ours, theirs = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(theirs)
