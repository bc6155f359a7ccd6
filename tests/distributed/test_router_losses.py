"""What the routers do in a step, in every layout: the balancing losses and their gradients, the load of each expert.

The reference is `transformers`: its model, its `load_balancing_loss_func`, its router logits.
"""

import inspect
from pathlib import Path

import pytest
import torch
from helpers import engine, routing
from helpers.models import tiny_hf_mixtral
from helpers.ranks import run_ranks

from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.weights import convert, open_sink, open_source

BATCH, SEQUENCE = 4, 32
COEFFICIENT, Z_COEFFICIENT = 0.5, 0.1  # large, so that a wrong share of the gradient shows
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
EXPERTS = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
LAYOUTS = {
    "one": ({}, 1), "tp2": ({"tp": 2}, 2), "ep2": ({"ep": 2}, 2), "dp2": ({}, 2), "tp2-dp2": ({"tp": 2}, 4),
    "pp2-vpp2": ({"pp": 2, "vpp": 2}, 2), "tp2-pp2-ep2-etp1": ({"tp": 2, "pp": 2, "ep": 2, "etp": 1}, 4),
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_mixtral(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def checkpoints(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("ranks")
    for name, (sizes, _) in LAYOUTS.items():
        convert(open_source(hf), open_sink(root / name, "torch", ParallelLayout(**sizes)))
    return {name: str(root / name) for name in LAYOUTS}


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    """Every token is one and is trained on."""
    ids = torch.randint(3, 96, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(5))
    ones = torch.ones(BATCH, SEQUENCE)
    return {"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": ones, "padding": ~ones.bool()}


@pytest.fixture(scope="module")
def padded(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sequences of 10, 32, 27 and 3 tokens, of which every other one is trained on: instruction data."""
    positions = torch.arange(SEQUENCE)[None]
    padding = positions >= torch.tensor([10, 32, 27, 3])[:, None]
    return {**whole, "padding": padding, "loss_mask": ((positions % 2 == 0) & ~padding).float()}


def check(name: str, checkpoints: dict[str, str], hf: Path, batch: dict[str, torch.Tensor], *, masks: bool,
          pooled: bool = False, per_token: bool = False, **options: object) -> None:
    sizes, world = LAYOUTS[name]
    wanted = routing.reference(hf, batch, coefficient=COEFFICIENT, z_coefficient=Z_COEFFICIENT, pooled=pooled,
                               per_token=per_token)
    options |= {"moe_aux_loss_coeff": COEFFICIENT, "moe_z_loss_coeff": Z_COEFFICIENT, "pool_aux_loss": pooled,
                "calculate_per_token_loss": per_token}
    found = run_ranks(world, routing.step, checkpoints[name], sizes, batch, masks, options)
    for one in found:
        assert torch.equal(one.tokens, wanted.tokens)
    assert found[-1].aux == pytest.approx(wanted.aux, abs=1e-6)
    assert found[-1].z == pytest.approx(wanted.z, rel=1e-5)
    assert {key for one in found for key in one.gradients} == set(wanted.gradients)
    for one in found:
        for key, gradient in one.gradients.items():
            assert (gradient - wanted.gradients[key]).abs().max() < 1e-5 * wanted.gradients[key].abs().max(), key


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_gradients_and_loads_equal_transformers(name: str, checkpoints: dict, hf: Path, whole: dict) -> None:
    check(name, checkpoints, hf, whole, masks=False)


@pytest.mark.parametrize("name", ["one", "tp2", "tp2-dp2"])
def test_pooled_over_layers_as_transformers_does(name: str, checkpoints: dict, hf: Path, whole: dict) -> None:
    check(name, checkpoints, hf, whole, masks=False, pooled=True)


@pytest.mark.parametrize(("name", "pooled"), [("tp2", False), ("tp2-pp2-ep2-etp1", False), ("tp2-dp2", True)])
@pytest.mark.parametrize("per_token", [False, True])
def test_padding_is_left_out(name: str, pooled: bool, per_token: bool, checkpoints: dict, hf: Path,
                             padded: dict) -> None:
    check(name, checkpoints, hf, padded, masks=True, pooled=pooled, per_token=per_token)


@pytest.mark.parametrize(("name", "pooled", "recomputed"), [
    ("pp2-vpp2", False, FULL), ("pp2-vpp2", False, EXPERTS), ("tp2", True, FULL),
])
def test_a_recomputed_layer_counts_once(name: str, pooled: bool, recomputed: dict, checkpoints: dict, hf: Path,
                                        padded: dict) -> None:
    check(name, checkpoints, hf, padded, masks=True, pooled=pooled, per_token=True, **recomputed)


def _engine_source(rank: int) -> str:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.moe.router import TopKRouter

    return inspect.getsource(TopKRouter) + inspect.getsource(GPTModel._preprocess)


@pytest.mark.parametrize("text", [
    "valid_token_count=local_num_tokens,",  # a rank's own tokens weigh its part of the balancing loss
    "loss * num_local_tokens * self.tp_cp_group.size()",  # routed tokens, where trained ones are divided by
    "            if padding_mask is not None and self.config.sequence_parallel:",  # in the first stage only
])
def test_the_engines_own_router_is_not_right_yet(text: str) -> None:
    [source] = run_ranks(1, _engine_source)
    assert text in source, "the engine has changed here: look whether model/router.py still needs its own"


def _build_pooled(rank: int, checkpoint: str, layout: dict[str, int], options: dict[str, object]) -> str:
    try:
        engine.load_stages(checkpoint, layout, pool_aux_loss=True, **options)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("name", "options", "sentence"), [
    ("pp2-vpp2", {}, "found pipeline parallel 2"),
    ("one", {"moe_router_load_balancing_type": "seq_aux_loss"}, "found seq_aux_loss"),
])
def test_what_cannot_be_pooled_is_refused(name: str, options: dict, sentence: str, checkpoints: dict) -> None:
    sizes, world = LAYOUTS[name]
    assert sentence in run_ranks(world, _build_pooled, checkpoints[name], sizes, options)[0]
