"""A base of 4 bits is the base rounded to 4 bits, to the last bit; nothing dense is kept for backward."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapters
from helpers.models import nf4_rounded, tiny_hf_mixtral
from helpers.ranks import run_ranks

LAYOUTS = {"tp1": ({}, 1), "tp2": ({"tp": 2}, 2), "ep2": ({"ep": 2}, 2), "tp2-ep2": ({"tp": 2, "ep": 2, "etp": 1}, 2),
           "tp2-ep2-etp2": ({"tp": 2, "ep": 2, "etp": 2}, 4), "cp2": ({"cp": 2}, 2), "ep2-cp2": ({"ep": 2, "cp": 2}, 2),
           "tp2-cp2": ({"tp": 2, "cp": 2}, 4)}
EVERY_DAY = ("tp2-ep2",)
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}  # shares of a row are whole blocks


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_mixtral(tmp_path_factory.mktemp("hf"), **WIDE)


@pytest.fixture(scope="module")
def rounded(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with every linear rounded by bitsandbytes."""
    return nf4_rounded(hf, tmp_path_factory.mktemp("rounded") / "hf")


@pytest.fixture(scope="module")
def adapter(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters.write_adapter(tmp_path_factory.mktemp("adapter") / "all", hf)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.slow)
                                  for name in LAYOUTS])
def test_a_packed_base_equals_the_rounded_one(name: str, hf: Path, rounded: Path, adapter: Path) -> None:
    sizes, world = LAYOUTS[name]
    batches = torch.randint(3, 96, (2, 4, 33), generator=torch.Generator().manual_seed(7))
    packed, dense = (run_ranks(world, _train, str(base), str(adapter), sizes, batches, quantized)
                     for base, quantized in ((hf, True), (rounded, False)))
    for ours, theirs in zip(packed, dense, strict=True):
        assert ours["losses"] == theirs["losses"] and ours["norms"] == theirs["norms"]
        for what in ("gradients", "adapters"):
            for piece, (_, _, part) in ours[what].items():
                assert torch.equal(part, theirs[what][piece][2]), (what, piece)


def _train(rank: int, hf: str, adapter: str, sizes: dict, batches: torch.Tensor, quantized: bool) -> dict[str, Any]:
    return adapters.train(rank, hf, adapter, sizes, batches, quantized=quantized)


def test_what_is_held(hf: Path, adapter: Path) -> None:
    """At least 99 % of a Mixtral's frozen numbers in 4 bits (of this one, whose vocabulary is not small beside its
    layers, all linears), and no dense weight among what autograd keeps.
    """
    [found] = run_ranks(1, _held, str(hf), str(adapter))
    assert found["dense linears"] == [] and found["packed"] == found["linears"]
    assert found["bytes"] == 0.5625 * found["packed"], "fp32 magnitudes; of a bf16 model it is 0.53125"
    assert found["kept"] == [], "dense weights kept for backward"
    assert found["saved"] > 0


def _held(rank: int, hf: str, adapter: str) -> dict[str, Any]:
    from megatron_mixtral.lora.nf4 import Packed

    [model] = adapters.stages(hf, adapter, {}, quantized=True)
    packed = [one for one in model.modules() if isinstance(one, Packed)]
    shapes = {tuple(one.shape[-2:]) for one in packed}
    config = model.mixtral
    linears = config.num_hidden_layers * (config.attention_parameters + config.num_local_experts
                                          * config.expert_parameters)
    saved: list[tuple[int, ...]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    tokens = torch.arange(3, 35)[None]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(tokens, torch.arange(32)[None], None, labels=tokens.roll(-1)).mean()
    loss.backward()
    return {"dense linears": [name for name, one in model.named_parameters()
                              if ("linear_" in name) and "lora_" not in name and "layer_norm" not in name],
            "packed": sum(one.shape.numel() for one in packed), "linears": linears,
            "bytes": sum(buffer.numel() * buffer.element_size() for one in packed for buffer in one.buffers()),
            "kept": [shape for shape in saved if shape[-2:] in shapes or shape[::-1][:2] in shapes],
            "saved": len(saved)}
