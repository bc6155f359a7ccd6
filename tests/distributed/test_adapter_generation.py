"""Generation with adapters, and without them beside it, in every kind of layout: transformers' and PEFT's tokens.

Ranks are started once for each number of them; each set works off a list of layouts, and the tests look at what came
out.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapters
from helpers.models import nf4_rounded, tiny_hf_mixtral
from helpers.ranks import run_ranks

from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.inference import SamplingParams, ScoringParams
from megatron_mixtral.weights import convert, open_sink, open_source
from megatron_mixtral.weights.adapters import fingerprint

VOCABULARY = 97  # odd: two tensor-parallel ranks pad it
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}  # shares of rows: whole blocks of 4 bits
NEW = 12
ON, OFF = (SamplingParams(max_tokens=NEW, ignore_eos=True, logprobs=20, adapter=one) for one in (True, False))
JOBS = {  # name: (ranks, adapters, layout, options of the generator)
    "tp1": (1, "all", {}, {"prompt_chunk": 5, "max_slots": 3}),
    "gate": (1, "gate", {}, {}),
    "qlora": (1, "qlora", {}, {}),
    "tp2": (2, "dist", {"tp": 2}, {}),
    "ep2": (2, "all", {"ep": 2}, {"max_slots": 2}),
    "qlora-tp2-ep2": (2, "qlora", {"tp": 2, "ep": 2, "etp": 1}, {}),
    "tp2-pp2-ep2": (4, "dist", {"tp": 2, "pp": 2, "ep": 2, "etp": 1}, {"prompt_chunk": 6}),
    "pp2-ep2-gate": (4, "gate", {"pp": 2, "ep": 2}, {"max_slots": 2}),
}
EVERY_DAY = [name for name, (world, *_) in JOBS.items() if world < 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and another one, a wide one and the same rounded to 4 bits, and adapters."""
    found = tmp_path_factory.mktemp("adapters")
    hf = tiny_hf_mixtral(found / "hf", vocab_size=VOCABULARY)
    tiny_hf_mixtral(found / "other", vocab_size=VOCABULARY, seed=9)
    wide = tiny_hf_mixtral(found / "wide", vocab_size=VOCABULARY, **WIDE)
    nf4_rounded(wide, found / "rounded")
    for name, base, targets in (("all", hf, adapters.ALL), ("gate", hf, (*adapters.ALL, "gate")),
                                ("qlora", wide, adapters.ALL)):
        own = adapters.write_adapter(found / name, base, targets)
        (own / "mixtral_adapter.json").write_text(json.dumps(
            {"base": fingerprint(open_source(base)), "quantized": base is wide}))
    convert(open_source(found / "all"), open_sink(found / "dist", "torch_dist", ParallelLayout(tp=2, pp=2)))
    return found


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (length,), generator=draw).tolist() for length in (5, 13, 1, 22)]


@pytest.fixture(scope="module")
def expected(folder: Path, prompts: list[list[int]]) -> dict[tuple[str, bool], Any]:
    """(adapters, whether they are on) -> (greedy tokens, log-probs [new, vocabulary] at their places) by prompt."""
    from transformers import MixtralForCausalLM

    def plain(name: str) -> Any:
        return MixtralForCausalLM.from_pretrained(folder / name, dtype=torch.float32, attn_implementation="eager")

    base, rounded = plain("hf"), plain("rounded")
    models = {("all", True): adapters.peft_model(folder / "hf", folder / "all"), ("all", False): base,
              ("gate", True): adapters.peft_model(folder / "hf", folder / "gate"), ("gate", False): base,
              ("qlora", True): adapters.peft_model(folder / "rounded", folder / "qlora"), ("qlora", False): rounded}
    found = {key: [adapters.greedy(model, prompt, NEW) for prompt in prompts] for key, model in models.items()}
    assert all(found["all", True][one][0] != found["all", False][one][0] for one in range(len(prompts)))
    return found | {("dist", on): found["all", on] for on in (True, False)}


def work_off(rank: int, folder: str, jobs: dict[str, Any], prompts: list[list[int]]) -> dict[str, Any]:
    """Name -> what this rank found: with adapters and without them in turns, both at once; then each text scored."""
    from megatron.core import parallel_state

    from megatron_mixtral.errors import CheckpointError
    from megatron_mixtral.inference import Generator

    found: dict[str, Any] = {}
    for name, (_, adapter, layout, options) in jobs.items():
        parallel_state.destroy_model_parallel()
        base = f"{folder}/{'wide' if adapter == 'qlora' else 'hf'}"
        generator = Generator.from_pretrained(base, ParallelLayout(**layout), adapter=f"{folder}/{adapter}", **options)
        both = [one for prompt in prompts for one in (prompt, prompt)]
        found[name] = generator.generate(both, [ON, OFF] * len(prompts)), scored(generator, prompts[-1])
    parallel_state.destroy_model_parallel()
    try:
        Generator.from_pretrained(f"{folder}/other", ParallelLayout(**layout), adapter=f"{folder}/all")
    except CheckpointError as error:
        found["refused"] = str(error)
    return found


def scored(generator: Any, prompt: list[int]) -> tuple[list[float], int]:
    """The prompt's last token after the others, four times at once, and how many tokens were not read again."""
    params = [ScoringParams(targets=((prompt[-1],),), adapter=adapter) for adapter in (True, False, True, False)]
    found = [one.logprobs[0].logprob for _, one in generator.completions([prompt[:-1]] * 4, params)]
    return found, generator.engine.tokens_kept


@pytest.fixture(scope="module")
def found(folder: Path, prompts: list[list[int]]) -> Any:
    """Name of a layout -> what each of its ranks found, worked off where it is first asked for."""
    everywhere: dict[int, list[dict[str, Any]]] = {}

    def of(name: str) -> list[Any]:
        world = JOBS[name][0] if name in JOBS else 1
        if world not in everywhere:
            jobs = {key: job for key, job in JOBS.items() if job[0] == world}
            everywhere[world] = run_ranks(world, work_off, str(folder), jobs, prompts)
        return [rank[name] for rank in everywhere[world]]

    return of


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.slow)
                                  for name in JOBS])
def test_tokens_and_logprobs_are_those_of_peft(name: str, found: Any, expected: dict[Any, Any],
                                               prompts: list[list[int]]) -> None:
    for completions, (scores, kept) in found(name):
        for (place, on), one in zip(itertools.product(range(len(prompts)), (True, False)), completions, strict=True):
            token_ids, logprobs = expected[JOBS[name][1], on][place]
            assert list(one.token_ids) == token_ids, (place, on)
            for at, entry in enumerate(one.logprobs):
                chosen, values = zip(*entry.top, strict=True)
                assert (torch.tensor(values) - logprobs[at, list(chosen)]).abs().max() < 1e-5
        assert scores[0] == pytest.approx(scores[2], abs=1e-5) and scores[1] == pytest.approx(scores[3], abs=1e-5)
        assert abs(scores[0] - scores[1]) > 1e-2
        assert kept or JOBS[name][0] > 1, "those that are alike share what was read, where one rank has both"


def test_another_base_is_refused_with_both_hashes(folder: Path, found: Any) -> None:
    [said] = found("refused")
    hashes = [fingerprint(open_source(folder / name)) for name in ("hf", "other")]
    assert all(one in said for one in hashes) and "on another base they mean nothing" in said


def test_adapters_are_no_model_and_a_model_is_no_adapter(folder: Path) -> None:
    """A PEFT folder that does not say its base, too."""
    nameless = adapters.write_adapter(folder / "nameless", folder / "hf")
    said = json.loads((nameless / "adapter_config.json").read_text()) | {"base_model_name_or_path": "somewhere/else"}
    (nameless / "adapter_config.json").write_text(json.dumps(said))
    for name in ("all", "dist", "nameless"):
        with pytest.raises(ConfigError, match=f"{name} holds adapters, and no model: give the model that they were"):
            open_source(folder / name, holds="model")
    with pytest.raises(ConfigError, match="hf holds a whole model, expected adapters"):
        open_source(folder / "hf", holds="adapters")
