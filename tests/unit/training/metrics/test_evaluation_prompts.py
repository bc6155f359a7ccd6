"""The prompts of a run are read, and what cannot be is refused, before anything starts."""

from pathlib import Path

import pytest

from megatron_mixtral.errors import MixtralError
from megatron_mixtral.inference import SamplingParams
from megatron_mixtral.tokenizer import mixtral_tokenizer_path
from megatron_mixtral.training.arguments import resolve
from megatron_mixtral.training.metrics import evaluation

TOKENIZER = ["--tokenizer-model", str(mixtral_tokenizer_path())]


def read(folder: Path, text: str, *flags: str) -> evaluation.Prompts | None:
    (folder / "prompts.jsonl").write_text(text, encoding="utf-8")
    argv = ["--model", "tiny", "--evaluation-prompts", str(folder / "prompts.jsonl"), *flags]
    return evaluation.read(resolve(argv, {"WORLD_SIZE": "4"}))


def test_prompts_with_their_settings(tmp_path) -> None:
    found = read(tmp_path, '"Once"\n{"prompt": [5, 6], "max_tokens": 3}\n', *TOKENIZER, "--evaluation-interval", "10")
    assert found.ids == [[1, *found.tokenizer.encode("Once")], [5, 6]] and found.interval == 10
    assert found.params == [SamplingParams(max_tokens=64), SamplingParams(max_tokens=3)]
    assert found.length == len(found.ids[0]) + 64
    run = evaluation.Evaluation(found, None)
    assert [step for step in range(1, 26) if run.due(step, 25)] == [10, 20, 25]
    ends = evaluation.Evaluation(read(tmp_path, '"a"', *TOKENIZER), None)
    assert [step for step in range(1, 26) if ends.due(step, 25)] == [25]
    assert evaluation.read(resolve(["--model", "tiny"], {"WORLD_SIZE": "1"})) is None


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
def test_what_cannot_be(tmp_path, text, flags, said) -> None:
    with pytest.raises(MixtralError) as error:
        read(tmp_path, text, *flags)
    assert said in str(error.value)


def test_an_interval_without_prompts() -> None:
    with pytest.raises(MixtralError, match="--evaluation-interval needs --evaluation-prompts FILE"):
        evaluation.read(resolve(["--model", "tiny", "--evaluation-interval", "5"], {"WORLD_SIZE": "1"}))
