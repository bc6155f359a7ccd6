"""A dense model computes here what it computes in transformers: logits, loss, gradient norm, its next tokens.

The reference of InternLM2 is the Llama that it was renamed from (`helpers/dense.py`).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import engine
from helpers.dense import KINDS, reference, tiny_dense
from helpers.ranks import run_ranks

from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.weights import convert, open_sink, open_source

LAYOUTS = {"tp1": ({}, 1), "tp2": ({"tp": 2}, 2), "pp2": ({"pp": 2}, 2), "tp2-pp2": ({"tp": 2, "pp": 2}, 4)}
CASES = [*((kind, "tp1") for kind in KINDS), ("mistral", "tp2"), ("tied llama", "pp2"), ("internlm2", "tp2-pp2")]
SLOW = [(kind, layout) for kind in KINDS for layout in LAYOUTS if (kind, layout) not in CASES]
NEW, PROMPTS = 12, ([5, 17, 40], [9, 3, 77, 21, 60, 33, 8])
WINDOW = {"sliding_window": 7}  # the Mistral's: shorter than the sequences


@pytest.fixture(scope="module")
def batch() -> torch.Tensor:
    return torch.randint(3, 96, (2, 25), generator=torch.Generator().manual_seed(7))


def options(kind: str) -> dict[str, Any]:
    return WINDOW if kind == "mistral" else {}


def by_transformers(kind: str, batch: torch.Tensor) -> tuple[torch.Tensor, float, float, list[list[int]]]:
    """Logits, loss, gradient norm, greedy continuations."""
    model = reference(kind, **options(kind))
    logits = model(batch[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    return logits.detach(), float(loss.detach()), float(norm), greedy(model)


@torch.no_grad()
def greedy(model: Any) -> list[list[int]]:
    return [model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
                           eos_token_id=None)[0, len(prompt):].tolist() for prompt in PROMPTS]


def with_adapters(kind: str, folder: Path) -> list[list[int]]:
    """Greedy continuations with adapters that PEFT itself has made, and saved in `folder`."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(reference(kind, **options(kind)), LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")).eval()
    model.save_pretrained(folder)
    return greedy(model)


def work(rank: int, folder: str, sizes: dict[str, int], batch: torch.Tensor) -> tuple[Any, ...]:
    """Logits, (losses, norms) of a step, what it did to the routers, greedy continuations (with adapters too, where
    there are any), the batch's scores.
    """
    from megatron.core import parallel_state

    from megatron_mixtral.inference import Generator, SamplingParams, ScoringParams

    logits = engine.logits(rank, f"{folder}/mg", sizes, batch)
    step, routers = watched_step(rank, f"{folder}/mg", sizes, batch)
    parallel_state.destroy_model_parallel()
    generator = Generator.from_pretrained(f"{folder}/hf", ParallelLayout(**sizes))
    longest = SamplingParams(max_tokens=NEW, ignore_eos=True)
    said = [list(one.token_ids) for one in generator.generate([*PROMPTS], longest)]
    scoring = [ScoringParams(targets=tuple((one,) for one in row[1:])) for row in batch.tolist()]
    scores = dict(generator.completions([row[:-1] for row in batch.tolist()], scoring))
    if Path(folder, "peft").exists():
        parallel_state.destroy_model_parallel()
        generator = Generator.from_pretrained(f"{folder}/hf", ParallelLayout(**sizes), adapter=f"{folder}/peft")
        said += [list(one.token_ids) for one in generator.generate([*PROMPTS], longest)]
    return logits, step, routers, said, [[one.logprob for one in scores[row].logprobs] for row in sorted(scores)]


def watched_step(rank: int, checkpoint: str, sizes: dict[str, int], batch: torch.Tensor) -> tuple[Any, list[float]]:
    """A step of training, and of each router the largest number after it."""
    built, load = [], engine.load_stages
    engine.load_stages = lambda *args, **more: built.extend(load(*args, **more)) or built
    try:
        step = engine.train(rank, checkpoint, sizes, batch[None], 1e-2)
    finally:
        engine.load_stages = load
    routers = [parameter for model in built for name, parameter in model.named_parameters() if "router" in name]
    assert routers and all(parameter.main_grad.abs().max() == 0 for parameter in routers)
    return step, [float(parameter.abs().max()) for parameter in routers]


@pytest.mark.parametrize(("kind", "layout"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_equals_transformers(kind: str, layout: str, tmp_path: Path, batch: torch.Tensor) -> None:
    sizes, world = LAYOUTS[layout]
    hf = tiny_dense(tmp_path / "hf", kind, **options(kind))
    convert(open_source(hf), open_sink(tmp_path / "mg", "torch", ParallelLayout(**sizes)))
    logits, loss, norm, said = by_transformers(kind, batch)
    if kind != "internlm2":  # which transformers, and so PEFT, does not know
        said += with_adapters(kind, tmp_path / "peft")
        assert said[0] != said[2]
    ranks = run_ranks(world, work, str(tmp_path), sizes, batch)
    found = torch.cat([rank[0] for rank in ranks if rank[0] is not None])
    print(f"{kind} {layout}: logits {(found - logits).abs().max():.1e}")
    assert found.shape == logits.shape and (found - logits).abs().max() < 1e-5
    scores = logits.log_softmax(-1).gather(2, batch[:, 1:, None])[:, :, 0]  # what evaluation and perplexity ask for
    assert (torch.tensor(ranks[0][4]) - scores).abs().max() < 1e-5
    for _, step, routers, tokens, _ in ranks:
        assert set(routers) == {0.0}, "a router was trained"
        assert tokens == said
        if step is not None:
            print(f"loss {step[0][0] - loss:.1e}, norm {step[1][0] / norm - 1:.1e} of it")
            assert step[0][0] == pytest.approx(loss, abs=1e-5) and step[1][0] == pytest.approx(norm, rel=1e-5)
