"""A step at Mixtral-8x7B's width through the CUDA branches, on a GPU and ranks that are not there (`fake_gpu`): it
runs, holds what the planner says, computes what the model's formula says, and the host hardly ever waits.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_mixtral.config import ParallelLayout, preset
from megatron_mixtral.planning import RunShape

ROOT = Path(__file__).resolve().parents[3]
MICRO_BATCHES = 2
STEPS: dict[str, dict[str, Any]] = {
    "one": {"sizes": {}}, "ep2": {"sizes": {"ep": 2}}, "ep8": {"sizes": {"ep": 8}}, "tp2": {"sizes": {"tp": 2}},
    "tp2-ep2-etp1": {"sizes": {"tp": 2, "ep": 2, "etp": 1}},
    "pp2, first": {"sizes": {"pp": 2}, "layers": 4}, "pp2, last": {"sizes": {"pp": 2}, "layers": 4, "rank": 1},
    "Ampere, a window": {"sizes": {}, "capability": [8, 0], "window": 1024},
}
WHOLE = [name for name, step in STEPS.items() if "window" not in step]  # the planner knows no window


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """What each step did. One process for all: nearly all of the time is imports."""
    words = [json.dumps({**step, "micro_batches": MICRO_BATCHES}) for step in STEPS.values()]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run([sys.executable, "-m", "helpers.rehearsal", *words], env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(STEPS, map(json.loads, lines), strict=True))


def shape_of(name: str) -> tuple[RunShape, int]:
    step = STEPS[name]
    layout = ParallelLayout(**step["sizes"])
    layout = ParallelLayout(**step["sizes"], world=layout.min_world)
    config = dataclasses.replace(preset("mixtral-8x7b"), num_hidden_layers=step.get("layers", 2))
    shape = RunShape(config, layout, 4096, 1, MICRO_BATCHES * layout.data_parallel)
    return shape, layout.coord_of(step.get("rank", 0)).pp


@pytest.mark.parametrize("name", WHOLE)
def test_memory_is_the_planners(name: str, found: dict[str, Any]) -> None:
    """What does not change in a step to the byte, what a step keeps within 10 %."""
    from megatron_mixtral.planning import activations, stage_memory

    with patch.object(activations, "logits", lambda shape: 0.0):  # the graph keeps none
        expected = stage_memory(*shape_of(name))
    for kind in ("weights", "gradients", "optimizer"):
        assert found[name][kind] == getattr(expected, kind), kind
    assert found[name]["activations"] == pytest.approx(expected.activations, rel=0.1)


@pytest.mark.parametrize("name", STEPS)
def test_the_host_waits_once_a_layer(name: str, found: dict[str, Any]) -> None:
    """For the counts of tokens of a micro-batch, and four times a step (two of them in the first alone); between
    pipeline stages besides once a transfer, which is the engine's way around a defect of old versions of torch.
    """
    waits = dict(found[name]["waits"])
    transfers = sum(waits.pop(place) for place in list(waits) if "p2p_communication" in place)
    assert sum(waits.values()) <= shape_of(name)[0].layers_of_stage(0) * MICRO_BATCHES + 4, waits
    assert transfers <= 2 * MICRO_BATCHES
    assert not found[name]["masked"]  # everywhere a flash kernel serves


@pytest.mark.parametrize("name", WHOLE)
def test_flops_are_the_formulas_and_what_is_computed_again(name: str, found: dict[str, Any]) -> None:
    shape, stage = shape_of(name)
    config, last = shape.config, stage == shape.layout.pp - 1
    layers = shape.layers_of_stage(stage)
    head = 6 * config.vocab_size * config.hidden_size
    model = dataclasses.replace(config, num_hidden_layers=layers).training_flops_per_token(4096) - head * (not last)
    # The loss makes its logits again, flash attention its scores: Q K^T over half the square.
    again = head / 3 * last + layers * 2 * (4096 / 2) * config.num_attention_heads * config.head_dim
    expected = MICRO_BATCHES * 4096 * (model + again) / shape.layout.tp
    assert sum(found[name]["flops"].values()) == pytest.approx(expected, rel=1e-9)


def test_weight_gradients_are_added_by_their_products(found: dict[str, Any]) -> None:
    """Those of experts, linears and output layer; the router's alone, an eighth of a thousandth, is the engine's."""
    flops = found["one"]["flops"]
    shape, _ = shape_of("one")
    config = shape.config
    weights = 2 * (config.num_experts_per_tok * config.expert_parameters + config.attention_parameters)
    weights += config.vocab_size * config.hidden_size
    assert flops["addmm"] == 2 * MICRO_BATCHES * 4096 * weights


def test_experts_are_grouped_where_a_gpu_is_fast_at_it(found: dict[str, Any]) -> None:
    assert found["one"]["flops"]["_grouped_mm"] > 0
    older = found["Ampere, a window"]["flops"]
    assert "_grouped_mm" not in older
    assert older["mm"] == found["one"]["flops"]["mm"] + found["one"]["flops"]["_grouped_mm"]
