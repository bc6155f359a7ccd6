"""A step at Mixtral-8x7B's width through the CUDA branches, on a GPU and ranks that are not there (`fake_gpu`): it
runs, holds what the planner says, computes what the model's formula says, and the host hardly ever waits.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_mixtral.config import ParallelLayout, preset
from megatron_mixtral.planning import RunShape, activations
from megatron_mixtral.planning.communication import communication_volume
from megatron_mixtral.planning.memory import stage_memory

ROOT = Path(__file__).resolve().parents[3]
STEPS: dict[str, dict[str, Any]] = {
    "one": {"sizes": {}}, "ep2": {"sizes": {"ep": 2}}, "ep8": {"sizes": {"ep": 8}}, "tp2": {"sizes": {"tp": 2}},
    "tp2-ep2-etp1": {"sizes": {"tp": 2, "ep": 2, "etp": 1}},
    "pp2, first": {"sizes": {"pp": 2}, "layers": 4}, "pp2, last": {"sizes": {"pp": 2}, "layers": 4, "rank": 1},
    "Ampere, a window": {"sizes": {}, "capability": [8, 0], "window": 1024},
    "8 GPUs": {"sizes": {"ep": 8}, "world": 8, "layers": 1},
    "64 GPUs": {"sizes": {"pp": 4, "vpp": 8, "ep": 8}, "world": 64, "layers": 32, "micro_batches": 4},
    "256 GPUs, 8x22B": {"sizes": {"tp": 2, "pp": 8, "ep": 8, "etp": 1}, "world": 256, "layers": 8, "rank": 255,
                        "preset": "mixtral-8x22b"},
    "256 GPUs, experts cut": {"sizes": {"tp": 2, "pp": 4, "ep": 4, "etp": 2}, "world": 256, "layers": 4},
    "1,024 GPUs": {"sizes": {"tp": 4, "pp": 4, "ep": 8, "etp": 1}, "world": 1024, "layers": 4},
}
WHOLE = [name for name, step in STEPS.items() if "window" not in step]  # the planner knows no window


def rehearsed(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each step did. One process for all: much of the time is imports."""
    words = list(map(json.dumps, steps))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run([sys.executable, "-m", "helpers.rehearsal", *words], env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    return dict(zip(STEPS, rehearsed(list(STEPS.values())), strict=True))


def shape_of(name: str) -> tuple[RunShape, int]:
    step = STEPS[name]
    layout = ParallelLayout(**step["sizes"])
    layout = ParallelLayout(**step["sizes"], world=step.get("world", layout.min_world))
    config = dataclasses.replace(preset(step.get("preset", "mixtral-8x7b")), num_hidden_layers=step.get("layers", 2))
    shape = RunShape(config, layout, 4096, 1, step.get("micro_batches", 2) * layout.data_parallel)
    return shape, layout.coord_of(step.get("rank", 0)).pp


@pytest.mark.parametrize("name", WHOLE)
def test_memory_is_the_planners(name: str, found: dict[str, Any]) -> None:
    """What does not change in a step to the byte, what a step keeps within 10 %."""
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
    shape, _ = shape_of(name)
    assert sum(waits.values()) <= shape.layers_of_stage(0) * shape.micro_batches + 4, waits
    assert transfers <= 2 * shape.micro_batches
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
    expected = shape.micro_batches * 4096 * (model + again) / shape.layout.tp
    assert sum(found[name]["flops"].values()) == pytest.approx(expected, rel=1e-9)


def test_weight_gradients_are_added_by_their_products(found: dict[str, Any]) -> None:
    """Those of experts, linears and output layer; the router's alone, an eighth of a thousandth, is the engine's."""
    flops = found["one"]["flops"]
    shape, _ = shape_of("one")
    config = shape.config
    weights = 2 * (config.num_experts_per_tok * config.expert_parameters + config.attention_parameters)
    weights += config.vocab_size * config.hidden_size
    assert flops["addmm"] == 2 * shape.micro_batches * 4096 * weights


@pytest.mark.parametrize("name", WHOLE)
def test_bytes_sent_are_the_planners(name: str, found: dict[str, Any]) -> None:
    """In bf16, at any number of ranks. Tokens have their probabilities with them, in fp32; the engine also gathers the
    counts of tokens, a few hundred bytes, and sums up gradients of norms, which the planner leaves out.
    """
    shape, stage = shape_of(name)
    volume, sent = communication_volume(shape, stage), Counter[str]()
    for operation, _, size in found[name]["sent"]:
        sent[operation] += size
    assert sent["alltoall_base_"] == pytest.approx(volume.expert, rel=1e-3)
    assert sent["allgather_"] + sent["reduce_scatter_"] == pytest.approx(volume.expert_tensor, rel=1e-3)
    assert sent["_allgather_base_"] + sent["_reduce_scatter_base_"] == pytest.approx(volume.tensor, rel=1e-4, abs=2e4)
    assert found[name]["to_other_stages"] == volume.pipeline
    # Of six bytes a parameter four are gradients; of weights the engine gathers each twice without
    # --overlap-param-gather where experts have an optimizer of their own.
    gradients = (volume.dense_gradients + volume.expert_gradients) * 4 / 6
    assert sent["reduce_scatter_tensor_coalesced_"] == pytest.approx(gradients, rel=1e-6)


def test_experts_are_grouped_where_a_gpu_is_fast_at_it(found: dict[str, Any]) -> None:
    assert found["one"]["flops"]["_grouped_mm"] > 0
    older = found["Ampere, a window"]["flops"]
    assert "_grouped_mm" not in older
    assert older["mm"] == found["one"]["flops"]["mm"] + found["one"]["flops"]["_grouped_mm"]


def test_the_page_has_the_least_times_of_the_rehearsed_step() -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run([sys.executable, "-m", "helpers.roofline", "h100-sxm"], env=environment, capture_output=True,
                          text=True)
    table = "\n".join(line for line in done.stdout.splitlines() if line.startswith("|"))
    assert table.count("\n") == 10, done.stderr[-2000:]
    assert table in (ROOT / "docs/performance.md").read_text("utf-8"), f"put this into docs/performance.md:\n{table}"


def idle_share(orders: list[str], vpp: int) -> float:
    """Idle time over time at work of stages that take their passes in these orders, a backward pass twice as long as a
    forward one. Each waits for the stage before it (after it, backward); the k-th pass is that of micro-batch and chunk
    as the interleaved schedule has them (Narayanan et al. 2021, arXiv 2104.04473, 2.2).
    """
    pp, ends = len(orders), {}
    counts, clocks = [Counter[str]() for _ in orders], [0.0] * pp
    while any(orders):
        before = sum(map(len, orders))
        for stage, order in enumerate(orders):
            if not order:
                continue
            kind, k = order[0], counts[stage][order[0]]
            chunk = k % (pp * vpp) // pp if vpp > 1 else 0
            chunk = vpp - 1 - chunk if kind == "B" else chunk
            batch = k // (pp * vpp) * pp + k % pp if vpp > 1 else k
            place = chunk * pp + stage  # among all chunks of the model
            last = place == pp * vpp - 1
            need = ("F", batch, place - 1) if kind == "F" else ("F" if last else "B", batch, place + (not last))
            if place + (kind == "B") and need not in ends:
                continue
            clocks[stage] = max(clocks[stage], ends.get(need, 0.0)) + (1 if kind == "F" else 2)
            ends[kind, batch, place] = clocks[stage]
            counts[stage][kind] += 1
            orders[stage] = order[1:]
        assert sum(map(len, orders)) < before, "the stages wait for one another"
    return max(clocks) / (3 * counts[0]["F"]) - 1


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "layers", "micro_batches"), [
    ({"pp": 4}, 4, 8), ({"pp": 4, "vpp": 8, "ep": 8}, 32, 8), ({"pp": 2, "vpp": 2}, 4, 6)], ids=str)
def test_the_bubble_is_that_of_the_engines_schedule(sizes: dict[str, int], layers: int, micro_batches: int) -> None:
    layout = ParallelLayout(**sizes)
    stage = layout.min_world // layout.pp
    steps = [{"sizes": sizes, "layers": layers, "micro_batches": micro_batches, "rank": rank * stage}
             for rank in range(layout.pp)]
    layout = ParallelLayout(**sizes, world=layout.min_world)
    shape = RunShape(preset("mixtral-8x7b"), layout, 4096, 1, micro_batches * layout.data_parallel)
    assert idle_share([one["order"] for one in rehearsed(steps)], layout.vpp) == pytest.approx(shape.bubble)
