"""A training step with adapters is PEFT's on `transformers` with linear experts, in every layout.

Bars, from five steps in fp32: loss, gradient norm and raw gradients 1e-5; adapters after Adam's steps 5e-5, since
Adam divides by the root of squares.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapters
from helpers.models import tiny_hf_mixtral
from helpers.ranks import run_ranks
from safetensors.torch import load_file

LAYOUTS = {
    "tp1": ({}, 1), "tp2": ({"tp": 2}, 2), "tp2-etp1": ({"tp": 2, "etp": 1}, 2), "pp2": ({"pp": 2}, 2),
    "pp2-vpp2": ({"pp": 2, "vpp": 2}, 2), "ep2": ({"ep": 2}, 2), "dp2": ({}, 2),
    "tp2-ep2-etp1": ({"tp": 2, "ep": 2, "etp": 1}, 2), "pp2-ep2": ({"pp": 2, "ep": 2}, 4),
    "uneven-pp2": ({"pp": 2, "first": 1}, 2), "tp2-pp2-dp2": ({"tp": 2, "pp": 2}, 8),
    "tp2-pp2-ep2-etp2": ({"tp": 2, "pp": 2, "ep": 2}, 8),
    "cp2": ({"cp": 2}, 2), "tp2-cp2": ({"tp": 2, "cp": 2}, 4), "ep2-cp2": ({"ep": 2, "cp": 2}, 2),
    "pp2-cp2": ({"pp": 2, "cp": 2}, 4),
}
EVERY_DAY = ("tp2", "pp2-ep2")
STEPS, BATCH = 5, 4


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_mixtral(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def batches() -> torch.Tensor:
    return torch.randint(3, 96, (STEPS, BATCH, adapters.SEQUENCE + 1), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def adapter(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters.write_adapter(tmp_path_factory.mktemp("adapter") / "all", hf)


@pytest.fixture(scope="module")
def reference(hf: Path, adapter: Path, batches: torch.Tensor) -> dict[str, Any]:
    return adapters.peft_train(hf, adapter, batches)


def assert_same(found: list[dict[str, Any]], expected: dict[str, Any], gradients: float = 1e-5,
                weights: float = 5e-5, sums: float | None = None) -> None:
    """`sums` is the bar of losses and norms, by default that of gradients."""
    sums = gradients if sums is None else sums
    for what, bar in (("gradients", gradients), ("adapters", weights)):
        joined = adapters.join([one[what] for one in found])
        assert joined.keys() == expected[what].keys()
        worst = {name: float((joined[name] - expected[what][name]).abs().max()) for name in joined}
        assert max(worst.values()) < bar, (what, max(worst, key=worst.get), max(worst.values()))
    for one in found:
        assert one["norms"] == pytest.approx(expected["norms"], abs=sums)
    losses = [one["losses"] for one in found if one["losses"]]
    assert losses and all(own == pytest.approx(expected["losses"], abs=sums) for own in losses)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.slow)
                                  for name in LAYOUTS])
def test_steps_equal_peft(name: str, hf: Path, adapter: Path, batches: torch.Tensor, reference: dict) -> None:
    sizes, world = LAYOUTS[name]
    assert_same(run_ranks(world, _train, str(hf), str(adapter), sizes, batches, {}), reference)


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["moe_act", "layernorm"]}
OPTIONS = {  # name: (layout, options of ours, whether it runs every day)
    # A frozen embedding gives the first recomputed layer an input that wants no gradient: see lora.apply.
    "all-recomputed": ("pp2", FULL, True), "all-recomputed-tp2": ("tp2", FULL, False),
    "parts-recomputed": ("tp2-ep2-etp1", SELECTIVE, False), "overlap": ("dp2", {"overlap": True}, False),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if OPTIONS[name][2] else pytest.mark.slow)
                                  for name in OPTIONS])
def test_options_change_nothing(name: str, hf: Path, adapter: Path, batches: torch.Tensor, reference: dict) -> None:
    layout, options, _ = OPTIONS[name]
    sizes, world = LAYOUTS[layout]
    assert_same(run_ranks(world, _train, str(hf), str(adapter), sizes, batches, options), reference)


@pytest.mark.parametrize("layout", ["tp2-ep2-etp1", pytest.param("tp1", marks=pytest.mark.slow)])
def test_packed_samples_equal_rows_of_their_own(layout: str, hf: Path, adapter: Path, batches: torch.Tensor) -> None:
    sizes, world = LAYOUTS[layout]
    found = run_ranks(world, _train, str(hf), str(adapter), sizes, batches[:2], {"lengths": (16, 16)})
    assert_same(found, adapters.peft_train(hf, adapter, batches[:2], lengths=(16, 16)), weights=1e-4)


POSITIONS = torch.arange(adapters.SEQUENCE)
UNEVEN = torch.stack([(POSITIONS >= 8) & (POSITIONS < 24), POSITIONS % 5 != 0, POSITIONS < 11,
                      POSITIONS % 7 == 3]).float()
KINDS = {  # rows of which two ranks train different numbers of tokens, the first none of one
    "masked": {"masks": UNEVEN}, "per-token": {"masks": UNEVEN, "calculate_per_token_loss": True},
    "packed": {"masks": UNEVEN, "lengths": (12, 20)}, "all-recomputed": {"masks": UNEVEN, **FULL},
    "packed-recomputed": {"masks": UNEVEN, "lengths": (8, 4, 20), "calculate_per_token_loss": True, **FULL},
}


SHARED = [name for name in LAYOUTS if "cp" in name]


@pytest.fixture(scope="module")
def kinds(hf: Path, adapter: Path, batches: torch.Tensor) -> Callable[[str], dict[str, Any]]:
    """What PEFT makes of two steps of a kind."""
    return functools.cache(lambda kind: adapters.peft_train(hf, adapter, batches[:2], **KINDS[kind]))


@pytest.mark.parametrize(("layout", "names"), [
    pytest.param("cp2", ["masked", "packed-recomputed"], id="cp2 in short"),
    *(pytest.param(name, [*KINDS], id=name, marks=pytest.mark.slow) for name in SHARED)])
def test_sequences_cut_over_ranks_train_as_whole_ones(layout: str, names: list[str], hf: Path, adapter: Path,
                                                      batches: torch.Tensor, kinds: Callable) -> None:
    """Gradients within 1e-6 of the same layout's without context parallelism, and as PEFT's. Experts that get few
    tokens have gradients so small that Adam's quotient tells them apart: 1e-4.
    """
    sizes, world = LAYOUTS[layout]
    whole = {axis: size for axis, size in sizes.items() if axis != "cp"}
    given = (str(hf), str(adapter))
    found = run_ranks(world, _kinds, *given, sizes, batches[:2], names)
    expected = run_ranks(max(world // 2, *whole.values(), 1), _kinds, *given, whole, batches[:2], names)
    for kind in names:
        own, other = ([one[kind] for one in ranks] for ranks in (found, expected))
        joined = {what: adapters.join([one[what] for one in other]) for what in ("gradients", "adapters")}
        loss = next(one["losses"] for one in other if one["losses"])
        assert_same(own, {**joined, "norms": other[0]["norms"], "losses": loss}, 1e-6, 1e-4, sums=1e-5)
        assert_same(own, kinds(kind), weights=1e-4)


def _kinds(rank: int, hf: str, adapter: str, sizes: dict, batches: torch.Tensor, names: list[str]) -> dict[str, Any]:
    return {kind: adapters.train(rank, hf, adapter, sizes, batches, **KINDS[kind]) for kind in names}


TARGETS = {  # name: (layout, targets); attention alone leaves the optimizer of the experts without a parameter
    "attention": ("ep2", ("q_proj", "k_proj", "v_proj", "o_proj")), "two": ("tp2", ("q_proj", "v_proj")),
    "router": ("tp2-ep2-etp1", (*adapters.ALL, "gate")), "down": ("tp2-ep2-etp1", ("o_proj", "w2")),
    "router-cp": ("tp2-cp2", (*adapters.ALL, "gate")),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in ("attention", "router") else pytest.mark.slow)
                                  for name in TARGETS])
def test_other_targets_equal_peft(name: str, hf: Path, batches: torch.Tensor, tmp_path: Path) -> None:
    layout, targets = TARGETS[name]
    sizes, world = LAYOUTS[layout]
    adapter = adapters.write_adapter(tmp_path / "adapter", hf, targets)
    found = run_ranks(world, _train, str(hf), str(adapter), sizes, batches[:2], {})
    assert_same(found, adapters.peft_train(hf, adapter, batches[:2]))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp1", "tp2-ep2-etp1", "pp2"])
def test_bf16_is_near_peft_in_fp32(layout: str, hf: Path, adapter: Path, batches: torch.Tensor) -> None:
    """Bars of bf16's 8 bits: 2e-2 for a loss of 5, for a norm of 1 and for gradients up to 0.2. Adam's first step is
    as large for the smallest gradient as for any, so of the adapters it is the way that they went.
    """
    sizes, world = LAYOUTS[layout]
    found = run_ranks(world, _train, str(hf), str(adapter), sizes, batches[:1], {"dtype": torch.bfloat16})
    reference = adapters.peft_train(hf, adapter, batches[:1])
    assert_same(found, reference, gradients=2e-2, weights=2.5 * adapters.LR)
    start = load_file(adapter / "adapter_model.safetensors")
    ended = adapters.join([one["adapters"] for one in found])
    ours, theirs = (torch.cat([(one[name] - start[name]).flatten() for name in start])
                    for one in (ended, reference["adapters"]))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.9


def _train(rank: int, hf: str, adapter: str, sizes: dict, batches: torch.Tensor, options: dict) -> dict[str, Any]:
    return adapters.train(rank, hf, adapter, sizes, batches, **options)
