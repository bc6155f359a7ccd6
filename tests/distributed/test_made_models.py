"""Models that are made to know all answers, to know the contrary, and to know nothing, from their files to the report.

The tiny Mixtral stays random; of its output layer only the rows of the four letters are not zero. They are the exact
solution of as many linear equations as there are prompts, which are fewer than the model is wide.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.mmlu import write_mmlu
from helpers.models import tiny_hf_mixtral
from helpers.ranks import run_ranks

from examples.quickstart.hf_tokenizer import write_hf_tokenizer
from megatron_mixtral.evaluation import read_mmlu
from megatron_mixtral.tokenizer import load_tokenizer

SUBJECTS, QUESTIONS, WIDTH = ("anatomy", "marketing", "philosophy", "sociology"), 7, 64
SCALES = {"knows": 20.0, "contrary": -20.0, "uniform": 0.0}


def make(folder: Path) -> None:
    """`folder/KIND` for each kind of model, of which the questions in `folder/mmlu` are asked."""
    from lm_eval.tasks import TaskManager
    from transformers import MixtralForCausalLM

    write_hf_tokenizer(folder / "knows")
    tokenizer = load_tokenizer("HuggingFaceTokenizer", folder / "knows")
    tiny_hf_mixtral(folder / "random", vocab_size=32000, hidden_size=WIDTH, max_position_embeddings=512)
    model = MixtralForCausalLM.from_pretrained(folder / "random", dtype=torch.float32).eval()
    mmlu, contexts = read_mmlu(folder / "mmlu"), []
    for method, requests in (("log-likelihood", 4), ("modellink", 1)):  # of each question
        tasks = TaskManager(include_defaults=False).load([*mmlu.tasks(method=method).values()])["tasks"]
        for task in tasks.values():
            task.build_all_requests()
            contexts += [one.args[0] for one in task.instances[::requests]]
    answers = 2 * [one.answer for _, splits in sorted(mmlu.subjects.items()) for one in splits["test"]]
    assert len(contexts) == len(answers) == 2 * len(SUBJECTS) * QUESTIONS < WIDTH
    with torch.no_grad():
        states = torch.stack([model.model(torch.tensor([[1, *tokenizer.encode(one)]])).last_hidden_state[0, -1]
                              for one in contexts]).double()
        wanted = torch.nn.functional.one_hot(torch.tensor(answers), 4).double() - 0.25
        rows = torch.linalg.lstsq(states, wanted, driver="gelsd").solution.T
        assert torch.allclose(states @ rows.T, wanted, atol=1e-6)
        letters = [tokenizer.encode(f"Answer: {letter}")[-1] for letter in "ABCD"]
        for kind, scale in SCALES.items():
            model.lm_head.weight.zero_()
            model.lm_head.weight[letters] = (scale * rows).float()
            model.save_pretrained(folder / kind)
            write_hf_tokenizer(folder / kind)


def measure(rank: int, folder: str) -> dict[str, Any]:
    from megatron.core import parallel_state

    from megatron_mixtral.evaluation import Harness, evaluate, report
    from megatron_mixtral.inference import Generator, cli

    found = {}
    for kind in SCALES:
        parallel_state.destroy_model_parallel()
        generator = Generator.from_pretrained(f"{folder}/{kind}")
        with cli.leading(generator) as is_first:
            if is_first:
                for method in ("log-likelihood", "modellink"):
                    if kind == "uniform" and method == "modellink":
                        continue  # of equal logits the first token is the most probable one, which is no letter
                    tasks = read_mmlu(f"{folder}/mmlu").tasks(method=method)
                    parts = evaluate(Harness(generator), tasks, None, {})
                    found[kind, method] = report.assemble(parts, {}, is_mmlu=True)["groups"]["mmlu"]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("made")
    write_mmlu(folder / "mmlu", SUBJECTS, QUESTIONS)
    make(folder)
    return run_ranks(1, measure, str(folder))[0]


@pytest.mark.parametrize(("kind", "accuracy"), [("knows", 1.0), ("contrary", 0.0), ("uniform", 0.25)])
def test_what_a_model_was_made_to_know_is_measured(kind, accuracy, found) -> None:
    total = found[kind, "log-likelihood"]
    assert abs(total["acc,none"] - accuracy) <= 3 * total["acc_stderr,none"]
    assert (total["acc_stderr,none"] > 0) == (kind == "uniform")


@pytest.mark.parametrize(("kind", "accuracy"), [("knows", 1.0), ("contrary", 0.0)])
def test_modellinks_procedure_sees_the_same(kind, accuracy, found) -> None:
    assert found[kind, "modellink"]["exact_match,letter"] == accuracy
