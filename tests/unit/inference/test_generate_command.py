"""The `generate` command: where prompts come from, what is wrong with them, and what is written."""

import argparse
import io
import json
from pathlib import Path

import pytest
from helpers.fake_engine import FakeEngine

from examples.quickstart.hf_tokenizer import write_hf_tokenizer
from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.inference import Completion, Generator, SamplingParams, TokenLogprobs, cli
from megatron_mixtral.tokenizer import chat_prompts, load_tokenizer

GREEDY = SamplingParams()


def requests(*argv: str, stdin: str = "", monkeypatch: pytest.MonkeyPatch | None = None) -> tuple[list, list]:
    if monkeypatch is not None:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", nargs="+")
    parser.add_argument("--prompts-file", type=Path)
    parser.add_argument("--jsonl", action="store_true")
    return cli._requests(parser.parse_args(argv), GREEDY)


def test_prompts_of_flags_lines_and_json_lines(tmp_path, monkeypatch) -> None:
    assert requests("--prompts", "a b", "c") == (["a b", "c"], [GREEDY, GREEDY])
    (tmp_path / "p.txt").write_text("one\n\n {two}  \n", encoding="utf-8")
    assert requests("--prompts-file", str(tmp_path / "p.txt"))[0] == ["one", " {two}  "]
    lines = '"你好\\n"\n{"prompt": [1, 5], "seed": 3, "stop": ["x"]}\n'
    (tmp_path / "p.jsonl").write_text(lines, encoding="utf-8")
    expected = (["你好\n", [1, 5]], [GREEDY, SamplingParams(seed=3, stop=("x",))])
    assert requests("--prompts-file", str(tmp_path / "p.jsonl")) == expected
    assert requests("--jsonl", stdin=lines, monkeypatch=monkeypatch) == expected
    assert requests(stdin="a\nb", monkeypatch=monkeypatch)[0] == ["a", "b"]


@pytest.mark.parametrize(("line", "said"), [
    ("{", "p.jsonl, line 2: not JSON"), ("3", "expected a text, or an object with a prompt"),
    ('{"prompt": [1, true]}', "a list of token ids"), ('{"text": "a"}', "expected a text"),
    ('{"prompt": "a", "colour": 1}', "colour: beside the prompt there may be max_tokens, "),
    ('{"prompt": "a", "top_p": 2}', "p.jsonl, line 2: top_p is 2, expected a number above 0 and at most 1"),
])
def test_lines_that_are_no_prompts(tmp_path, line, said) -> None:
    (tmp_path / "p.jsonl").write_text(f'"fine"\n{line}\n')
    with pytest.raises(DataError) as error:
        requests("--prompts-file", str(tmp_path / "p.jsonl"))
    assert said in str(error.value)


def test_files_without_prompts(tmp_path, monkeypatch) -> None:
    with pytest.raises(DataError, match="standard input holds no prompt"):
        requests(stdin="\n\n", monkeypatch=monkeypatch)
    with pytest.raises(DataError, match="nowhere cannot be read"):
        requests("--prompts-file", str(tmp_path / "nowhere"))


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(ConfigError, match="there is no tokenizer in the model's directory, nor was one given"):
        Generator(None, None).generate("a")


def test_flags_become_parameters() -> None:
    parser = argparse.ArgumentParser()
    cli.sampling_flags(parser)
    assert cli.sampling_params(parser.parse_args([])) == SamplingParams()
    argv = "--max-tokens 5 --temperature 0.5 --top-k 3 --top-p 0.9 --repetition-penalty 1.1 --seed 4 --num-samples 2 " \
        "--stop a b --stop-token-ids 7 8 --ignore-eos --logprobs 1"
    assert cli.sampling_params(parser.parse_args(argv.split())) == SamplingParams(
        max_tokens=5, temperature=0.5, top_k=3, top_p=0.9, repetition_penalty=1.1, seed=4, n=2, stop=("a", "b"),
        stop_token_ids=(7, 8), ignore_eos=True, logprobs=1)
    with pytest.raises(ConfigError, match="temperature is -1.0"):
        cli.sampling_params(parser.parse_args(["--temperature", "-1"]))


def test_answers_are_json_lines(tmp_path, capsys) -> None:
    one = Completion((1, 2), 1, (5,), " 好", (TokenLogprobs(5, -0.5, ((5, -0.5),)),), "stop", 5)
    cli._write([cli._answer("a", one)], None)
    cli._write([cli._answer("a", one)], tmp_path / "out.jsonl")
    written = capsys.readouterr().out
    assert written == (tmp_path / "out.jsonl").read_text(encoding="utf-8") and "好" in written
    assert json.loads(written) == {
        "prompt": "a", "index": 1, "text": " 好", "token_ids": [5], "finish_reason": "stop", "stop_reason": 5,
        "logprobs": [{"token_id": 5, "logprob": -0.5, "top": [[5, -0.5]]}]}
    plain = cli._answer("a", Completion((1,), 0, (), "", (), "length"))
    assert plain == {"prompt": "a", "text": "", "token_ids": (), "finish_reason": "length"}


def test_prompts_as_questions(tmp_path) -> None:
    write_hf_tokenizer(tmp_path)
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tmp_path / "tokenizer.json")
    prompts, params = cli._as_questions(Generator(FakeEngine(), tokenizer), "chatml", ["a", [1, 2]], [GREEDY, GREEDY])
    assert prompts == [chat_prompts(tokenizer, tmp_path, "chatml").prompt([{"role": "user", "content": "a"}]), [1, 2]]
    assert [one.stop for one in params] == [("<|im_end|>",)] * 2
    with pytest.raises(ConfigError, match="--prompt-template model: .* brings no chat template"):
        cli._as_questions(Generator(FakeEngine(), tokenizer), "model", ["a"], [GREEDY])
