"""A converted Mixtral is the Mixtral of `transformers`, in every layout: logits, loss, gradient norm, training."""

from pathlib import Path

import pytest
import torch
from helpers import engine
from helpers.models import tiny_hf_mixtral
from helpers.ranks import run_ranks

from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.weights import convert, open_sink, open_source

# Layout -> ranks. ETP 1 folds the experts into the dense grid, ETP 2 makes the full grid.
LAYOUTS = {
    "tp1-pp1-ep1": ({}, 1),
    "tp2": ({"tp": 2}, 2),
    "tp2-etp1": ({"tp": 2, "etp": 1}, 2),  # wrong gradients in engines before 0.19 (Megatron-LM #5916)
    "pp2": ({"pp": 2}, 2),
    "ep2": ({"ep": 2}, 2),
    "tp2-pp2": ({"tp": 2, "pp": 2}, 4),
    "pp2-ep2": ({"pp": 2, "ep": 2}, 4),
    "tp2-ep2-etp1": ({"tp": 2, "ep": 2, "etp": 1}, 2),
    "tp2-ep2-etp2": ({"tp": 2, "ep": 2}, 4),
    "tp2-pp2-ep2-etp1": ({"tp": 2, "pp": 2, "ep": 2, "etp": 1}, 4),
    "tp2-pp2-ep2-etp2": ({"tp": 2, "pp": 2, "ep": 2}, 8),
    "pp2-vpp2": ({"pp": 2, "vpp": 2}, 2),
}
# A sequence on several ranks; test_context_parallel.py has its gradients, masks and packed rows.
SLOW = pytest.mark.slow
CONTEXT = {
    "cp2": ({"cp": 2}, 2), "cp4": ({"cp": 4}, 4), "tp2-cp2": ({"tp": 2, "cp": 2}, 4),
    "pp2-cp2": ({"pp": 2, "cp": 2}, 4), "ep2-cp2": ({"ep": 2, "cp": 2}, 2),
    "pp2-vpp2-cp2": ({"pp": 2, "vpp": 2, "cp": 2}, 4),
}
STEPS, BATCH, SEQUENCE, LEARNING_RATE, CLIP = 10, 4, 32, 1e-3, 1.0


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_mixtral(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def batches() -> torch.Tensor:
    """[steps, batch, sequence + 1] token ids."""
    return torch.randint(3, 96, (STEPS, BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def checkpoints(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Rank directories of every layout."""
    root, found = tmp_path_factory.mktemp("ranks"), {}
    for name, (sizes, _) in (LAYOUTS | CONTEXT).items():
        convert(open_source(hf), open_sink(root / name, "torch", ParallelLayout(**sizes)))
        found[name] = str(root / name)
    return found


@pytest.fixture(scope="module")
def reference(hf: Path, batches: torch.Tensor) -> dict[str, object]:
    """The same in plain torch: logits of the first batch, then `STEPS` steps of torch.optim.AdamW."""
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager")
    model.eval()  # no dropout anyway; keeps the aux loss out
    with torch.no_grad():
        logits = model(batches[0][:, :-1]).logits
    # The engine decays matrices only.
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for batch in batches:
        optimizer.zero_grad()
        out = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(out.reshape(-1, out.shape[-1]), batch[:, 1:].reshape(-1))
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        losses.append(float(loss))
        optimizer.step()
    return {"logits": logits, "losses": losses, "norms": norms}


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_equal_transformers(name: str, checkpoints: dict, batches: torch.Tensor, reference: dict) -> None:
    sizes, world = LAYOUTS[name]
    shares = [one for one in run_ranks(world, engine.logits, checkpoints[name], sizes, batches[0]) if one is not None]
    found = torch.cat(shares)
    assert found.shape == reference["logits"].shape
    assert (found - reference["logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", LAYOUTS)
def test_first_step_equals_transformers(name: str, checkpoints: dict, batches: torch.Tensor, reference: dict) -> None:
    sizes, world = LAYOUTS[name]
    results = [one for one in run_ranks(world, engine.train, checkpoints[name], sizes, batches[:1], LEARNING_RATE)
               if one is not None]
    for losses, norms in results:
        assert losses[0] == pytest.approx(reference["losses"][0], abs=1e-5)
        assert norms[0] == pytest.approx(reference["norms"][0], abs=1e-4)


@pytest.mark.parametrize("name", [one if one == "ep2-cp2" else pytest.param(one, marks=SLOW) for one in CONTEXT])
def test_sequences_on_several_ranks_equal_transformers(name: str, checkpoints: dict, batches: torch.Tensor,
                                                       reference: dict) -> None:
    sizes, world = CONTEXT[name]
    results = [one for one in run_ranks(world, engine.train, checkpoints[name], sizes, batches, LEARNING_RATE)
               if one is not None]
    assert results
    for losses, norms in results:
        print(f"{name}: loss {losses[0] - reference['losses'][0]:.1e}, norm {norms[0] - reference['norms'][0]:.1e}")
        assert losses[:1] == pytest.approx(reference["losses"][:1], abs=1e-5)
        assert norms[:1] == pytest.approx(reference["norms"][:1], abs=1e-5)
        assert losses == pytest.approx(reference["losses"], abs=1e-4)
        assert norms == pytest.approx(reference["norms"], rel=1e-3)


@pytest.mark.parametrize("name", ["tp2-pp2-ep2-etp1", "tp2-pp2-ep2-etp2", "pp2-vpp2"])
def test_ten_steps_equal_plain_torch(name: str, checkpoints: dict, batches: torch.Tensor, reference: dict) -> None:
    sizes, world = LAYOUTS[name]
    results = [one for one in run_ranks(world, engine.train, checkpoints[name], sizes, batches, LEARNING_RATE)
               if one is not None]
    assert results and reference["losses"][0] - reference["losses"][-1] > 0.01, "the reference must learn something"
    for losses, norms in results:
        assert losses == pytest.approx(reference["losses"], abs=1e-4)
        assert norms == pytest.approx(reference["norms"], rel=1e-3)


@pytest.mark.parametrize("name", ["tp1-pp1-ep1", "pp2-ep2", "tp2-ep2-etp1"])
@pytest.mark.parametrize("modules", [["moe_act", "layernorm"], ["moe"]], ids=["activation", "experts"])
def test_recomputed_parts_change_nothing(name: str, modules: list[str], checkpoints: dict,
                                         batches: torch.Tensor) -> None:
    """The same operations on the same numbers; gradients of tokens may be summed in another order."""
    sizes, world = LAYOUTS[name]
    arguments = (checkpoints[name], sizes, batches[:3], LEARNING_RATE)
    again, plain = ([one for one in run_ranks(world, *call) if one is not None]
                    for call in ((_train_recomputing, *arguments, modules), (engine.train, *arguments)))
    for (losses, norms), (expected, expected_norms) in zip(again, plain, strict=True):
        assert losses == pytest.approx(expected, rel=1e-6) and norms == pytest.approx(expected_norms, rel=1e-6)


def _train_recomputing(rank: int, *arguments: object) -> object:
    *rest, modules = arguments
    return engine.train(rank, *rest, recompute_granularity="selective", recompute_modules=modules)
