"""What a run's model is asked is read, and what cannot be is refused, before anything starts."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.mmlu import write_mmlu

from megatron_mixtral import __main__ as commands
from megatron_mixtral.disk import human_size
from megatron_mixtral.errors import MixtralError
from megatron_mixtral.inference import SamplingParams
from megatron_mixtral.runtime import launch
from megatron_mixtral.tokenizer import mixtral_tokenizer_path
from megatron_mixtral.training.arguments import resolve
from megatron_mixtral.training.metrics import evaluation, questions

TOKENIZER = ["--tokenizer-model", str(mixtral_tokenizer_path())]


def plan(*flags: str) -> evaluation.Plan | None:
    return evaluation.read(resolve(["--model", "tiny", *flags], {"WORLD_SIZE": "4"}))


def read(folder: Path, text: str, *flags: str) -> evaluation.Plan | None:
    (folder / "prompts.jsonl").write_text(text, encoding="utf-8")
    return plan("--evaluation-prompts", str(folder / "prompts.jsonl"), *flags)


def test_prompts_with_their_settings(tmp_path) -> None:
    found = read(tmp_path, '"Once"\n{"prompt": [5, 6], "max_tokens": 3}\n', *TOKENIZER, "--evaluation-interval", "10")
    assert found.ids == [[1, *found.tokenizer.encode("Once")], [5, 6]] and found.interval == 10
    assert found.params == [SamplingParams(max_tokens=64), SamplingParams(max_tokens=3)]
    assert found.longest == len(found.ids[0]) + 64 and found.questions is None
    run = evaluation.Evaluation(found, None)
    assert [step for step in range(1, 26) if run.due(step, 25)] == [10, 20, 25]
    ends = evaluation.Evaluation(read(tmp_path, '"a"', *TOKENIZER), None)
    assert [step for step in range(1, 26) if ends.due(step, 25)] == [25]
    assert plan() is None


def test_tasks_with_their_questions(tmp_path) -> None:
    write_mmlu(tmp_path / "mmlu", ["anatomy"])
    found = plan(*TOKENIZER, "--eval-tasks", "mmlu,toy", "--eval-data-path", str(tmp_path / "mmlu" / "test"),
                 "--eval-limit", "7", "--eval-include-path", str(tmp_path))
    asked = found.questions
    assert (asked.names, asked.limit, asked.include) == (["toy"], 7, tmp_path) and found.ids == []
    assert asked.mmlu.questions == 4 and 0 < asked.length <= questions.MAX_LENGTH
    assert plan(*TOKENIZER, "--eval-tasks", "mmlu").questions.names == ["mmlu"], "of the hub"


@pytest.mark.parametrize(("text", "flags", "said"), [
    ('"a"', [], "needs the tokenizer of the data: --tokenizer-model DIR"),
    ('"a"', [*TOKENIZER, "--evaluation-interval", "0"], "--evaluation-interval 0: expected a number of steps"),
    ('"a"', [*TOKENIZER, "--overlap-param-gather"], "does not go with --overlap-param-gather: leave one of them out"),
    ('"a"', [*TOKENIZER, "--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"],
     "does not go with virtual pipeline stages"),
    ("3", TOKENIZER, "prompts.jsonl, line 1: expected a text"),
    ('{"prompt": [32000]}', TOKENIZER, "token id 32000 is not one of the model's 32000"),
    ('{"prompt": "a", "max_tokens": 999999}', TOKENIZER, "take 1000001 tokens, and the model's context has "),
], ids=lambda value: None if isinstance(value, list) else value[:20])
def test_prompts_that_cannot_be(tmp_path, text, flags, said) -> None:
    with pytest.raises(MixtralError) as error:
        read(tmp_path, text, *flags)
    assert said in str(error.value)


@pytest.mark.parametrize(("flags", "said"), [
    (["--evaluation-interval", "5"], "--evaluation-interval needs --evaluation-prompts FILE or --eval-tasks NAMES"),
    (["--eval-limit", "5"], "--eval-limit needs --eval-tasks NAMES"),
    (["--eval-data-path", "mmlu"], "--eval-data-path needs --eval-tasks mmlu"),
    (["--eval-tasks", "arc"], "--eval-tasks needs the tokenizer of the data"),
    ([*TOKENIZER, "--eval-tasks", ","], "expected a name at least, and a limit of at least 1"),
    ([*TOKENIZER, "--eval-tasks", "arc", "--eval-limit", "0"], "a limit of at least 1"),
    ([*TOKENIZER, "--eval-tasks", "arc", "--eval-data-path", "x"], "is of the task mmlu, and --eval-tasks is arc"),
    ([*TOKENIZER, "--eval-tasks", "mmlu", "--eval-data-path", "absent"], "absent holds no MMLU"),
    ([*TOKENIZER, "--eval-tasks", "arc", "--overlap-param-gather"], "--eval-tasks does not go with --overlap-param"),
    ([*TOKENIZER, "--eval-tasks", "arc", "--eval-include-path", "absent"], "--eval-include-path absent is no folder"),
], ids=lambda value: None if isinstance(value, list) else value[:20])
def test_tasks_that_cannot_be(flags, said) -> None:
    with pytest.raises(MixtralError) as error:
        plan(*flags)
    assert said in str(error.value)


def test_a_misspelt_task_ends_a_run_before_its_ranks_are_started(monkeypatch, capsys) -> None:
    def started(*arguments: Any) -> None:
        raise AssertionError("ranks are started")

    monkeypatch.setattr(launch, "take_part", started)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    argv = ["--model", "tiny", "--tensor-model-parallel-size", "2", "--mock-data", "--seq-length", "64",
            "--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-3", *TOKENIZER, "--eval-tasks", "hellasway"]
    assert commands.run("pretrain", argv) == 1
    assert "error: there is no task 'hellasway' among lm-eval's; is it hellaswag" in capsys.readouterr().err


def test_a_dry_run_counts_the_cache(tmp_path, caplog) -> None:
    """Of questions 8 slots of 4,096 tokens or the model's context, of prompts no more than they take."""
    argv = ["--model", "mixtral-8x7b", "--tensor-model-parallel-size", "2", "--seq-length", "64", "--micro-batch-size",
            "1", "--bf16", "--dry-run", *TOKENIZER]

    def said(*flags: str) -> str:
        caplog.clear()
        assert commands.run("pretrain", [*argv, *flags]) == 0
        return next(line for line in caplog.messages if line.startswith("memory per device: "))

    (tmp_path / "prompts.jsonl").write_text('{"prompt": [5, 6], "max_tokens": 300}\n"Once"')
    with caplog.at_level("INFO"):
        assert "cache" not in said()
        assert f"evaluation cache {human_size(2 * 32 * 8 * 4096 * 4 * 128 * 2)}" in said("--eval-tasks", "arc")
        assert f"evaluation cache {human_size(2 * 32 * 2 * 512 * 4 * 128 * 2)}" in said(
            "--evaluation-prompts", str(tmp_path / "prompts.jsonl"))
        assert "cache" not in said("--evaluation-prompts", "absent.jsonl")
        assert "its cache is counted once this is mended: the prompts of absent.jsonl cannot be read" in caplog.text


def test_figures_are_of_groups_and_of_tasks_that_are_in_none() -> None:
    answers = {"groups": {"mmlu": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "mmlu"}},
               "group_subtasks": {"mmlu": ["mmlu_stem"], "mmlu_stem": ["mmlu_anatomy"]},
               "results": {"mmlu_anatomy": {"acc,none": 0.25}, "gsm": {"exact_match,strict": 1, "alias": "gsm"}}}
    assert questions.figures(answers) == {"eval/mmlu/acc": 0.5, "eval/gsm/exact_match/strict": 1.0}
    assert questions.figures({}) == {}


def test_what_a_task_draws_is_not_drawn_from_the_run(monkeypatch) -> None:
    """Seeds that a task sets, and numbers that it draws, are undone."""
    from megatron_mixtral import evaluation as room

    def draws(*arguments: Any, **options: Any) -> dict[str, Any]:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return {}

    def drawn() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    monkeypatch.setattr(room, "evaluate", draws, raising=False)
    monkeypatch.setattr(room, "Harness", lambda *arguments: None, raising=False)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = drawn()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    questions.ask(None, questions.Questions(["toy"], None, None, None, 8))
    assert drawn() == expected
