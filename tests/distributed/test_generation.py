"""Generation in every kind of layout, from every kind of directory: the tokens of `transformers`, one prompt at a time.

Ranks are started twice, two and four; each set works off a list of layouts, and the tests look at what came out.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_hf_mixtral
from helpers.ranks import run_ranks

from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.inference import SamplingParams
from megatron_mixtral.weights import convert, open_sink, open_source

VOCABULARY, NEW = 97, 24  # odd: two tensor-parallel ranks pad it
LENGTHS = (5, 9, 13, 1, 7, 22, 3)
GREEDY = SamplingParams(max_tokens=NEW, ignore_eos=True, logprobs=2)
SAMPLED = [SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=0.9, top_k=20, top_p=0.95, seed=seed)
           for seed in range(4)]
FOUR = {  # name: (directory, layout, options of the generator)
    "tp2-pp2-ep2": ("ranks", {"tp": 2, "pp": 2, "ep": 2, "etp": 1}, {}),
    "tp2-pp2-few-slots": ("hf", {"tp": 2, "pp": 2}, {"max_slots": 3, "prompt_chunk": 5}),
    "tp2-ep2-two-replicas": ("dist", {"tp": 2, "ep": 2, "etp": 1}, {"max_slots": 2}),
    "pp2-ep2-unequal-work": ("hf", {"pp": 2, "ep": 2}, {"max_slots": 4, "prompt_chunk": 8}),
    "pp2-uneven-two-replicas": ("ranks", {"pp": 2, "first": 1}, {}),
    "tp2-ep2-etp2": ("hf", {"tp": 2, "ep": 2}, {}),
    "window-tp2-pp2": ("window", {"tp": 2, "pp": 2}, {"prompt_chunk": 6}),
}
TWO = {
    "tp2": ("dist", {"tp": 2}, {}),
    "pp2": ("ranks", {"pp": 2}, {"max_slots": 2}),
    "ep2": ("hf", {"ep": 2}, {"max_slots": 3}),
}
ONE = {
    "tp1": ("hf", {}, {}),
    "tp1-few-slots": ("ranks", {}, {"max_slots": 3, "prompt_chunk": 5}),
    "window": ("window", {}, {"prompt_chunk": 6}),
    "tp1-by-the-engine": ("hf", {}, {"max_slots": 3, "prompt_chunk": 5}),
}
PLAIN = {"tp1", "tp1-few-slots", "window", "pp2", "pp2-uneven-two-replicas"}  # by model/plain.py, not by the engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in three formats, and a model with a sliding window."""
    found = tmp_path_factory.mktemp("generation")
    source = open_source(tiny_hf_mixtral(found / "hf", vocab_size=VOCABULARY))
    convert(source, open_sink(found / "ranks", "torch", ParallelLayout(tp=2, ep=2)))
    convert(source, open_sink(found / "dist", "torch_dist"))
    tiny_hf_mixtral(found / "window", vocab_size=VOCABULARY, sliding_window=8)
    return found


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def by_transformers(directory: Path, prompts: list[list[int]]) -> list[tuple[list[int], torch.Tensor]]:
    """(greedy tokens, log-probs [new, vocabulary] of the whole vocabulary at each of their places)."""
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
                             eos_token_id=None, output_logits=True, return_dict_in_generate=True)
        found.append((out.sequences[0, len(prompt):].tolist(), torch.cat(out.logits).log_softmax(-1)))
    return found


@pytest.fixture(scope="module")
def expected(folder, prompts) -> dict[str, Any]:
    hf = by_transformers(folder / "hf", prompts)
    return {"hf": hf, "ranks": hf, "dist": hf, "window": by_transformers(folder / "window", prompts)}


def work_off(rank: int, folder: str, jobs: dict[str, Any], prompts: list[list[int]]) -> dict[str, Any]:
    """Name -> what this rank found: greedy completions, sampled ones, one that has all replicas for itself."""
    from megatron.core import parallel_state

    from megatron_mixtral.inference import Generator

    found = {}
    for name, (directory, layout, options) in jobs.items():
        parallel_state.destroy_model_parallel()
        generator = Generator.from_pretrained(f"{folder}/{directory}", ParallelLayout(**layout), **options)
        stage = generator.engine._stage
        if name == "tp1-by-the-engine":
            stage._plain = None
        assert (stage._plain is not None) == (name in PLAIN), name
        found[name] = (generator.generate(prompts, GREEDY), generator.generate(prompts[:4], SAMPLED),
                       generator.generate([prompts[0]], SamplingParams(max_tokens=3, ignore_eos=True)))
        engine = generator.engine
        assert not engine.has_work and engine.running == engine.waiting == 0
    return found


@pytest.fixture(scope="module")
def found(folder, prompts) -> dict[str, list[Any]]:
    """Name of a layout -> what each of its ranks found."""
    everywhere = {}
    for world, jobs in ((1, ONE), (2, TWO), (4, FOUR)):
        ranks = run_ranks(world, work_off, str(folder), jobs, prompts)
        everywhere |= {name: [rank[name] for rank in ranks] for name in jobs}
    return everywhere


@pytest.mark.parametrize("name", [*ONE, *TWO, *FOUR])
def test_tokens_and_logprobs_are_those_of_transformers(name, found, expected) -> None:
    directory, _, _ = (ONE | TWO | FOUR)[name]
    for greedy, _, [alone] in found[name]:
        assert list(alone.token_ids) == expected[directory][0][0][:3]  # other replicas have nothing to read
        for completion, (token_ids, logprobs) in zip(greedy, expected[directory], strict=True):
            assert list(completion.token_ids) == token_ids
            assert completion.finish_reason == "length" and completion.message is None
            for place, one in enumerate(completion.logprobs):
                assert abs(one.logprob - float(logprobs[place, one.token_id])) < 1e-5
                best = logprobs[place].topk(2)
                assert [token_id for token_id, _ in one.top] == best.indices.tolist()
                assert (torch.tensor([value for _, value in one.top]) - best.values).abs().max() < 1e-5


@pytest.mark.parametrize("name", [name for name in [*ONE, *TWO, *FOUR] if "window" not in name])
def test_a_seed_gives_the_same_text_in_every_layout_and_company(name, found) -> None:
    [(_, reference, _)] = found["tp1"]
    assert len({one.token_ids[0] for one in reference}) > 1 and all(one.logprobs == () for one in reference)
    for _, sampled, _ in found[name]:
        assert [one.token_ids for one in sampled] == [one.token_ids for one in reference]
