"""From questions to the report, with models that know all, nothing, or the contrary: is the scoring blind?"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.mmlu import write_mmlu

from megatron_mixtral.config import preset
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.evaluation import Harness, evaluate, read_mmlu, report
from megatron_mixtral.inference import Completion, TokenLogprobs
from megatron_mixtral.tokenizer import load_tokenizer, mixtral_tokenizer_path

SUBJECTS = ("anatomy", "marketing", "philosophy", "sociology")  # one of each category
QUESTIONS = 12
RIGHT = {"knows": 0.0, "contrary": -9.0, "uniform": -1.5}  # log-probability of the right letter
WRONG = {"knows": -9.0, "contrary": 0.0, "uniform": -1.5}


class Oracle:
    """A generator whose model is a table of answers. After `breaks_after` calls it is killed."""

    def __init__(self, mmlu: Any, kind: str, breaks_after: int | None = None) -> None:
        self.tokenizer = load_tokenizer("HuggingFaceTokenizer", mixtral_tokenizer_path())
        self.engine = SimpleNamespace(max_length=4096, tokens_read=0, tokens_kept=0)
        self.kind, self.left, self.calls = kind, breaks_after, 0
        self.answers = {one.question: "ABCD"[one.answer] for splits in mmlu.subjects.values() for one in splits["test"]}

    def completions(self, prompts: list[list[int]], params: list[Any]) -> Any:
        self.calls += 1
        if self.left is not None and self.calls > self.left:
            raise KeyboardInterrupt
        for place, (ids, asked) in enumerate(zip(prompts, params, strict=True)):
            assert ids[0] == self.tokenizer.bos_id and len(asked.targets) == 1
            assert [self.tokenizer.decode([one]).strip() for one in asked.targets[-1]] == list("ABCD")
            self.engine.tokens_read += len(ids)
            question = self.tokenizer.decode(ids[1:]).rpartition("\n\n")[2].partition("\nA. ")[0]
            right = self.answers[question]
            scores = [TokenLogprobs(one, (RIGHT if letter == right else WRONG)[self.kind], ((0, 0.0),))
                      for one, letter in zip(asked.targets[-1], "ABCD", strict=True)]
            yield place, Completion(tuple(ids), 0, (), "", tuple(scores), "scored")


class Writer(Oracle):
    """The same, asked for a text of one token: the right letter, the one after it, or none."""

    def completions(self, prompts: list[list[int]], params: list[Any]) -> Any:
        for place, (ids, asked) in enumerate(zip(prompts, params, strict=True)):
            assert ids[0] == self.tokenizer.bos_id and (asked.max_tokens, asked.temperature, asked.n) == (1, 0.0, 1)
            question = self.tokenizer.decode(ids[1:]).rpartition("\n\n")[2].partition("\nA. ")[0]
            place_of = "ABCD".index(self.answers[question])
            letter = {"knows": "ABCD"[place_of], "contrary": "BCDA"[place_of], "silent": "?"}[self.kind]
            new = self.tokenizer.encode(letter)[-1]
            yield place, Completion(tuple(ids), 0, (new,), letter, (), "length")


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return read_mmlu(write_mmlu(tmp_path_factory.mktemp("tasks") / "mmlu", SUBJECTS, QUESTIONS))


def run(mmlu: Any, oracle: Oracle, output: Path, depends: dict[str, Any], **options: Any) -> dict[str, Any]:
    parts = evaluate(Harness(oracle), mmlu.tasks(), output, depends, **options)
    return report.assemble(parts, depends, is_mmlu=True)


def depends(**changed: Any) -> dict[str, Any]:
    return {"bos_id": 1, "rope_theta": 1e6, "max_length": 4096, "limit": None} | changed


@pytest.mark.parametrize(("kind", "accuracy"), [("knows", 1.0), ("contrary", 0.0), ("uniform", 0.25)])
def test_what_a_model_knows_is_what_is_measured(kind, accuracy, mmlu, tmp_path) -> None:
    whole = run(mmlu, Oracle(mmlu, kind), tmp_path, depends())
    total = whole["groups"]["mmlu"]
    assert abs(total["acc,none"] - accuracy) <= 3 * total["acc_stderr,none"]
    assert (total["acc_stderr,none"] > 0) == (kind == "uniform")
    assert set(whole["groups"]) == {"mmlu", "mmlu_stem", "mmlu_humanities", "mmlu_social_sciences", "mmlu_other"}
    assert whole["n-samples"]["mmlu"]["effective"] == 4 * QUESTIONS == sum(
        whole["n-samples"][f"mmlu_{name}"]["effective"] for name in SUBJECTS)
    assert whole["tokens"]["requests"] == 16 * QUESTIONS and whole["tokens"]["requested"] == 4 * whole["tokens"]["read"]
    accuracies = [whole["results"][f"mmlu_{name}"]["acc,none"] for name in SUBJECTS]
    assert total["acc,none"] == pytest.approx(sum(accuracies) / 4)
    pooled = sum(QUESTIONS * one * (1 - one) for one in accuracies) / (4 * QUESTIONS - 4)  # as the groups of lm-eval
    assert total["acc_stderr,none"] == pytest.approx((pooled / (4 * QUESTIONS)) ** 0.5)
    table = report.table(whole, report.published(preset("mixtral-8x7b")))
    assert table.splitlines()[2].startswith(f"| MMLU | {4 * QUESTIONS} | 0.7060 | {total['acc,none']:.4f} | ")
    assert len(table.splitlines()) == 2 + 1 + 4 + 4
    assert f"These are {4 * QUESTIONS} questions of 4 subjects; MMLU has 14042 of 57." in report.remarks(whole, True)


@pytest.mark.parametrize(("kind", "accuracy"), [("knows", 1.0), ("contrary", 0.0), ("silent", 0.0)])
def test_modellinks_procedure_counts_letters(kind, accuracy, mmlu, tmp_path) -> None:
    parts = evaluate(Harness(Writer(mmlu, kind)), mmlu.tasks(method="modellink"), tmp_path, depends())
    whole = report.assemble(parts, depends(), is_mmlu=True)
    assert whole["groups"]["mmlu"] == {
        "alias": "mmlu", "exact_match,letter": accuracy, "exact_match_stderr,letter": 0.0}
    table = report.table(whole, report.published(preset("mixtral-8x7b"), "exact_match,letter"))
    assert table.splitlines()[2] == f"| MMLU | {4 * QUESTIONS} | 0.7060 | {accuracy:.4f} | 0.0000 |"
    assert len(table.splitlines()) == 2 + 1 + 4 + 4


def test_a_killed_evaluation_goes_on_and_gives_the_same(mmlu, tmp_path) -> None:
    whole = run(mmlu, Oracle(mmlu, "uniform"), tmp_path / "whole", depends(), limit=3)
    with pytest.raises(KeyboardInterrupt):
        run(mmlu, Oracle(mmlu, "uniform", breaks_after=2), tmp_path / "killed", depends(), limit=3)
    assert len([*(tmp_path / "killed/parts").iterdir()]) == 2
    with pytest.raises(ConfigError, match="holds 2 finished tasks: go on with --resume, or give another --output"):
        run(mmlu, Oracle(mmlu, "uniform"), tmp_path / "killed", depends(), limit=3)
    with pytest.raises(ConfigError, match="measured otherwise: dtype: None then, 'bfloat16' now"):
        run(mmlu, Oracle(mmlu, "uniform"), tmp_path / "killed", depends(dtype="bfloat16"), limit=3, resume=True)
    oracle = Oracle(mmlu, "uniform")
    again = run(mmlu, oracle, tmp_path / "killed", depends(), limit=3, resume=True)
    assert oracle.calls == 2 and json.dumps(again, sort_keys=True) == json.dumps(whole, sort_keys=True)


def test_what_could_explain_a_gap_is_said() -> None:
    whole = {"config": depends(bos_id=None, rope_theta=1e4, max_length=512, limit=2), "results": {},
             "tokens": {"truncated": 3, "requests": 8}}
    bos, base, cut, limit = report.remarks(whole, is_mmlu=False)
    assert "no BOS" in bos and "rotary base is 10000, Mixtral's is 1e+06" in base
    assert "3 of 8 contexts were longer than 512 tokens" in cut and "first 2 questions" in limit
    assert report.remarks(whole, is_mmlu=False, model_type="llama") == [bos, cut, limit], "its base is its own"
    whole |= {"config": depends(), "tokens": {"truncated": 0, "requests": 8}}
    assert report.remarks(whole, is_mmlu=False) == []


def test_figures_with_adapters_depend_on_them(tmp_path) -> None:
    """And those without say nothing of adapters, as before."""
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    tokenizer = SimpleNamespace(sha256="", bos_id=1)
    (plain, found) = (report.depends_on(preset("tiny"), tmp_path, tokenizer, adapter, limit=None)
                      for adapter in (None, tmp_path))
    assert found == plain | {"adapter": str(tmp_path), "adapter_fingerprint": report.fingerprint(tmp_path)}


def test_the_fingerprint_is_of_names_sizes_and_both_ends(tmp_path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10)
    found = {report.fingerprint(tmp_path)}
    for change in (lambda: (tmp_path / "a").write_bytes(b"x" * 9 + b"y"), lambda: (tmp_path / "a").write_bytes(b"x"),
                   lambda: (tmp_path / "a").rename(tmp_path / "b")):
        change()
        found.add(report.fingerprint(tmp_path))
    assert len(found) == 4
