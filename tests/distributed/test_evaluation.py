"""lm-eval's requests in every kind of layout: the figures of its own backend for transformers.

Ranks are started three times; each set works off a list of layouts, and the tests look at what came out.
"""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from helpers.mmlu import SUBJECTS, shipped_questions, write_mmlu, write_shipped
from helpers.models import tiny_hf_mixtral
from helpers.ranks import run_ranks

from examples.quickstart.hf_tokenizer import write_hf_tokenizer
from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.inference import SamplingParams

LAYOUTS = {  # name: (ranks, layout, options of the generator)
    "tp1": (1, {}, {}),
    "tp1-one-slot": (1, {}, {"max_slots": 1}),
    "tp2": (2, {"tp": 2}, {"max_slots": 3}),
    "pp2": (2, {"pp": 2}, {"prompt_chunk": 50}),
    "ep2": (2, {"ep": 2}, {"max_slots": 2}),
    "tp2-pp2-ep2": (4, {"tp": 2, "pp": 2, "ep": 2, "etp": 1}, {"max_slots": 4}),
}
LONG = "a word of a text that goes on and on, " * 40  # more tokens than the context has
SCORED = [("", "Once"), ("Once upon", " a time there was"), ("Once upon", " a time there is"), ("Once upon ", "a"),
          (LONG, " end"), (LONG + "x", " of the end"), ("Once upon", " a time there was")]
GENERATED = [("Once upon", {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}),
             (LONG, {"until": ["e"], "max_gen_toks": 20}), ("The", {"until": [], "max_gen_toks": 5})]


def answers(lm: Any, folder: str) -> dict[str, Any]:
    """What a model of lm-eval's says to everything."""
    from megatron_mixtral.evaluation import read_mmlu

    def ask(name: str, arguments: list[Any]) -> list[Any]:
        return getattr(lm, name)([SimpleNamespace(args=one) for one in arguments])

    return {"scored": ask("loglikelihood", SCORED), "generated": ask("generate_until", GENERATED),
            "rolling": ask("loglikelihood_rolling", [(LONG,), ("Once upon a time",)]),
            **measured(lm, [*read_mmlu(f"{folder}/mmlu/test").tasks().values()])}


def referee(lm: Any, folder: str) -> dict[str, Any]:
    """The questions that lm-eval ships: as MMLU, as ModelLink asks it, and as lm-eval has them continued."""
    from megatron_mixtral.evaluation import read_mmlu

    shipped = read_mmlu(f"{folder}/shipped", shots=1)
    modellinks = [*shipped.tasks(1, "modellink").values()][:4]
    return {"chosen": measured(lm, [*shipped.tasks(1).values()]),
            "written": measured(lm, [*modellinks, flan("anatomy"), flan("virology")])}


def measured(lm: Any, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    found = evaluate(lm, TaskManager(include_defaults=False).load(tasks), bootstrap_iters=1000)
    return {"results": found["results"], "samples": {
        name: [one["resps" if "exact_match" in one else "filtered_resps"] for one in samples]
        for name, samples in found["samples"].items()}}


def flan(subject: str) -> dict[str, Any]:
    """lm-eval's task of continuing a question step by step, of the questions themselves, and shorter."""
    import lm_eval
    from datasets import Dataset

    template = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/mmlu/flan_cot_fewshot" /
                               "_mmlu_flan_cot_fewshot_template_yaml").read_text())
    del template["dataset_path"], template["validation_split"], template["fewshot_config"]
    template["generation_kwargs"]["max_gen_toks"] = 8
    rows = shipped_questions(subject)
    return template | {"task": f"flan_{subject}", "num_fewshot": 0,
                       "custom_dataset": lambda **metadata: {"test": Dataset.from_list(rows)}}


def many_questions(generator: Any, folder: str) -> dict[str, int]:
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    from megatron_mixtral.evaluation import Harness, read_mmlu

    harness = Harness(generator)
    evaluate(harness, TaskManager(include_defaults=False).load([*read_mmlu(f"{folder}/many").tasks().values()]))
    return dict(harness.counts)


def work_off(rank: int, folder: str, layouts: dict[str, Any]) -> dict[str, Any]:
    from megatron.core import parallel_state

    from megatron_mixtral.inference import Generator, cli

    found = {}
    for name, (_, layout, options) in layouts.items():
        parallel_state.destroy_model_parallel()
        generator = Generator.from_pretrained(f"{folder}/hf", ParallelLayout(**layout), **options)
        with cli.leading(generator) as is_first:
            if is_first:
                from megatron_mixtral.evaluation import Harness

                harness = Harness(generator)
                found[name] = answers(harness, folder) | {"counts": dict(harness.counts)}
                found[name]["referee"] = referee(harness, folder)
                if name == "tp1":
                    found[name]["many"] = many_questions(generator, folder)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("evaluation")
    tiny_hf_mixtral(found / "hf", vocab_size=32000, max_position_embeddings=384)
    write_hf_tokenizer(found / "hf")
    write_mmlu(found / "mmlu")
    write_shipped(found / "shipped", SUBJECTS)
    write_mmlu(found / "many", ["anatomy"], questions=100)
    return found


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(folder / "hf"), dtype="float32", batch_size=1, device="cpu")
    forwarded, call = [], lm._model_call
    lm._model_call = lambda inps, **kwargs: forwarded.append(inps.numel()) or call(inps, **kwargs)
    return answers(lm, str(folder)) | {"forwarded": sum(forwarded), "referee": referee(lm, str(folder))}


@pytest.fixture(scope="module")
def found(folder) -> dict[str, Any]:
    everything = {}
    for world in (1, 2, 4):
        jobs = {name: one for name, one in LAYOUTS.items() if one[0] == world}
        everything |= run_ranks(world, work_off, str(folder), jobs)[0]
    return everything


@pytest.mark.parametrize("name", LAYOUTS)
def test_figures_are_those_of_lm_evals_own_backend(name, found, expected) -> None:
    ours = found[name]
    for (logprob, is_greedy), (their_logprob, theirs) in zip(ours["scored"], expected["scored"], strict=True):
        assert abs(logprob - their_logprob) < 1e-4 and is_greedy == theirs
    for mine, theirs in zip(ours["rolling"], expected["rolling"], strict=True):
        assert abs(mine - theirs) < 1e-6 * abs(theirs)
    assert ours["generated"] == expected["generated"] and all(ours["generated"])
    assert_same_choices(ours, expected)


def assert_same_choices(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(ours["samples"]) == 10
    for task, samples in ours["samples"].items():
        for mine, theirs in zip(samples, expected["samples"][task], strict=True):
            assert max(abs(one[0] - other[0]) for one, other in zip(mine, theirs, strict=True)) < 1e-4
            assert [one[1] for one in mine] == [other[1] for other in theirs]
    assert ours["results"] == expected["results"]  # accuracies and standard errors
    assert len({one["acc,none"] for one in ours["results"].values()}) > 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_lm_evals_own_questions_are_answered_alike(name, found, expected) -> None:
    ours, theirs = found[name]["referee"], expected["referee"]
    assert_same_choices(ours["chosen"], theirs["chosen"])
    assert ours["written"] == theirs["written"]  # texts token for token, accuracies and standard errors
    assert sum(map(len, ours["written"]["samples"].values())) == 4 * 4 + 2 * 5
    assert len({str(one) for one in ours["written"]["samples"]["flan_anatomy"]}) > 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_examples_and_choices_are_read_once(name, found, expected) -> None:
    counts = found[name]["counts"]
    generated = 12 + 20 + 5  # tokens that are written, at most
    written = 384 * len(GENERATED) + generated  # in generation it does not pass where forwarded tokens are counted
    assert abs(counts["distinct"] - expected["forwarded"]) <= written
    assert counts["requested"] > 3.5 * counts["distinct"] > 5 * counts["read"]
    assert 0 <= counts["read"] + counts["kept"] - counts["distinct"] <= generated
    assert counts["truncated"] == 3  # two that are scored, one that is continued


def caches(rank: int, folder: str, sizes: dict[str, Any], plan: Any) -> tuple[int, int]:
    """(stage of this rank, bytes of the cache that a run's evaluations take there)."""
    from megatron_mixtral.config import MixtralConfig
    from megatron_mixtral.inference import Generator
    from megatron_mixtral.training.metrics.evaluation import Evaluation

    layout = ParallelLayout(**sizes)
    generator = Generator.from_pretrained(f"{folder}/hf", layout, max_length=64)
    evaluation = Evaluation(plan, SimpleNamespace(layout=layout, config=MixtralConfig.from_hf_dir(f"{folder}/hf")))
    evaluation.watch(generator.engine._stage.model)
    cache = evaluation._make().engine._stage.cache
    return layout.coord_of(rank).pp, cache.keys.nbytes + cache.values.nbytes


@pytest.mark.parametrize("sizes", [
    {"pp": 2, "first": 1, "world": 2}, {"tp": 2, "pp": 2, "first": 1, "world": 4}], ids=str)
def test_a_run_plans_the_cache_of_its_evaluations(sizes, folder) -> None:
    """To the byte, on every stage, of which the last has more layers."""
    from megatron_mixtral.config import MixtralConfig
    from megatron_mixtral.planning import RunShape, stage_memory
    from megatron_mixtral.training.metrics.evaluation import Plan
    from megatron_mixtral.training.metrics.questions import Questions

    config, layout = MixtralConfig.from_hf_dir(folder / "hf"), ParallelLayout(**sizes)
    plan = Plan([[5] * 9], [SamplingParams(max_tokens=20)], Questions(["after"], None, None, None, 384), None,
                SimpleNamespace(eos_id=2))
    plain = RunShape(config, layout, 64, 1, layout.data_parallel, weight_bytes=4)
    shape = dataclasses.replace(plain, cache=plan.cache(config))
    for stage, taken in run_ranks(layout.world, caches, str(folder), sizes, plan):
        planned = stage_memory(shape, stage)
        assert planned.evaluation_cache == taken == planned.total - stage_memory(plain, stage).total > 0
        assert taken == 2 * (1, 3)[stage] * 8 * 512 * (2 // layout.tp) * 8 * 4


def test_a_hundred_questions_of_a_subject(found) -> None:
    """Fewer tokens than the sum of lm-eval's requests, and than its own backend forwards."""
    counts = found["tp1"]["many"]
    assert counts["requests"] == 400 and counts["truncated"] == 0
    assert counts["requested"] >= 15 * counts["read"] and counts["distinct"] >= 4 * counts["read"]
