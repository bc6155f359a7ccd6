"""What a run says of itself: figures of the right size, the same in every place, and the pictures made of them."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import datasets
from helpers.models import tiny_hf_mixtral
from helpers.program import Outcome, pretrain
from helpers.ranks import run_ranks

from megatron_mixtral.config import MixtralConfig
from megatron_mixtral.weights.edits import busiest

SEQUENCE = 32
RECIPE = ["--seq-length", str(SEQUENCE), "--micro-batch-size", "1", "--lr", "0", "--min-lr", "0", "--eval-iters", "0",
          "--lr-decay-style", "constant", "--use-distributed-optimizer"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("observability")


@pytest.fixture(scope="module")
def hf(folder: Path) -> Path:
    return tiny_hf_mixtral(folder / "hf")


@pytest.fixture(scope="module")
def data(folder: Path) -> list[str]:
    prefix = datasets.write_dataset(folder / "corpus_text_document", vocab_size=96)
    return ["--data-path", prefix, "--split", "969, 30, 1", "--data-cache-path", str(folder / "cache")]


# -- the time of a step ----------------------------------------------------------------------------------

MICRO_STEPS, FORWARD, OPTIMIZER = 16, 1.0, 9.0


def _slow_optimizer() -> None:
    """A clock on which a micro-step takes one second, the optimizer nine, and everything else none."""
    from megatron.core import timers

    from megatron_mixtral.runtime.engine_fixes import adam
    from megatron_mixtral.training import micro_batch

    now = 1000.0
    forward, optimizer = micro_batch.text_step, adam.FusedAdam.step

    def forward_step(*args: object) -> object:
        nonlocal now
        now += FORWARD
        return forward(*args)

    def step(*args: object, **kwargs: object) -> object:
        nonlocal now
        now += OPTIMIZER
        return optimizer(*args, **kwargs)

    micro_batch.text_step, adam.FusedAdam.step = forward_step, step
    timers.time = SimpleNamespace(time=lambda: now)


def test_throughput_counts_every_micro_step_and_the_optimizer(folder: Path, hf: Path, data: list[str]) -> None:
    argv = [*RECIPE, *data, "--hf-checkpoint", str(hf), "--global-batch-size", str(MICRO_STEPS), "--train-iters", "2"]
    found = pretrain(1, argv, folder / "clock", prepare=_slow_optimizer)
    assert found.codes == [0], found.logs[0][-3000:]
    tokens, seconds = MICRO_STEPS * SEQUENCE, MICRO_STEPS * FORWARD + OPTIMIZER
    for figures in found.steps.values():
        assert figures["step_seconds"] == seconds
        assert figures["tokens"] == tokens
        assert figures["tokens_per_second_per_device"] == tokens / seconds
    assert found.steps[1]["seconds_left"] == seconds and found.steps[2]["seconds_left"] == 0
    assert "| 20.5 tokens/s/device | 0:00:25 left | 25.000 s |" in found.logs[0]


# -- one run, seen everywhere ----------------------------------------------------------------------------

FAKE_WANDB = """
import json, pathlib
config = {}
def init(**settings):
    global file
    file = pathlib.Path(settings["dir"]) / "logged.jsonl"
def log(values, step=None):
    with file.open("a") as out:
        out.write(json.dumps({"step": step, **{name: float(value) for name, value in values.items()}}) + "\\n")
def finish():
    pass
"""


def _fake_wandb(directory: str) -> None:
    sys.path.insert(0, directory)


@pytest.fixture(scope="module")
def seen(folder: Path, hf: Path, data: list[str]) -> Outcome:
    """Two steps of four sequences on two tensor-parallel ranks that change no weight, in Hugging Face's convention."""
    (folder / "fake").mkdir()
    (folder / "fake" / "wandb.py").write_text(FAKE_WANDB)
    argv = [*RECIPE, *data, "--hf-checkpoint", str(hf), "--global-batch-size", "4", "--train-iters", "2",
            "--tensor-model-parallel-size", "2", "--moe-aux-loss-convention", "hf", "--calculate-per-token-loss",
            "--moe-z-loss-coeff", "1e-3", "--log-expert-load", "--device-peak-tflops", "0.5",
            "--tensorboard-dir", str(folder / "tensorboard"), "--tensorboard-log-interval", "2",
            "--log-level", "debug",
            "--wandb-project", "project", "--wandb-exp-name", "name", "--wandb-save-dir", str(folder / "wandb")]
    found = pretrain(2, argv, folder / "seen", prepare=partial(_fake_wandb, str(folder / "fake")))
    assert found.codes == [0, 0], found.logs[-1][-3000:]
    return found


def test_losses_and_loads_of_each_step_are_those_of_transformers(seen: Outcome, folder: Path, hf: Path,
                                                                 data: list[str]) -> None:
    from transformers import MixtralForCausalLM
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    [rows] = run_ranks(1, datasets.samples, data[1], str(folder / "cache2"), SEQUENCE, (8, 0, 0), 8)
    model = MixtralForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager")
    written = [json.loads(line) for line in (folder / "seen" / "expert_load.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in written] == [1, 2]
    for step, batch in enumerate(rows.split(4), 1):
        aux, loads = 0.0, torch.zeros(4, 4, dtype=torch.int64)
        for row in batch:
            with torch.no_grad():
                gates = model(row[None, :-1], output_router_logits=True).router_logits
            gates = tuple(gate.reshape(-1, 4) for gate in gates)
            aux += float(load_balancing_loss_func(gates, 4, 2)) / 4
            loads += torch.stack([gate.topk(2).indices.flatten().bincount(minlength=4) for gate in gates])
        assert seen.steps[step]["aux_loss"] == pytest.approx(aux, abs=1e-6)
        assert written[step - 1]["expert_load"] == loads.tolist()
        ratios = (loads.max(1).values * 4 / loads.sum(1)).tolist()
        assert seen.steps[step]["expert_imbalance"] == pytest.approx(sum(ratios) / 4)
        assert seen.steps[step]["expert_imbalance_worst"] == pytest.approx(max(ratios))
        assert ratios[seen.steps[step]["expert_imbalance_worst_layer"]] == max(ratios)


def test_the_expert_load_selects_experts(seen: Outcome, folder: Path, hf: Path) -> None:
    path = folder / "seen" / "expert_load.jsonl"
    total = sum(torch.tensor(json.loads(line)["expert_load"]) for line in path.read_text().splitlines())
    chosen = busiest(path, 2, MixtralConfig.from_hf_dir(hf))
    assert all(total[layer, experts].min() >= total[layer].sort().values[2] for layer, experts in enumerate(chosen))


def test_the_same_metrics_everywhere(seen: Outcome, folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged: dict[int, dict[str, float]] = {1: {}, 2: {}}
    for line in (folder / "wandb" / "logged.jsonl").read_text().splitlines():
        values = json.loads(line)
        logged[values.pop("step")].update(values)
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    names = {"lm loss": "lm_loss", "load_balancing_loss": "aux_loss", "z_loss": "z_loss", "grad-norm": "grad_norm",
             "learning-rate": "learning_rate", **{name.replace("_", "-"): name for name in (
                 "step_seconds", "tokens_per_second", "tokens_per_second_per_device", "model_tflops_per_device", "mfu",
                 "memory_bytes", "expert_imbalance", "expert_imbalance_worst")}}
    for theirs, ours in names.items():
        for step in (1, 2):
            assert logged[step][theirs] == pytest.approx(seen.steps[step][ours], rel=1e-6), theirs
        [event] = board.Scalars(theirs)  # of the second step alone: --tensorboard-log-interval 2
        assert event.step == 2 and event.value == pytest.approx(seen.steps[2][ours], rel=1e-6)
    assert max(logged[1][f"expert-imbalance/layer-{layer}"] for layer in range(4)) == pytest.approx(
        seen.steps[1]["expert_imbalance_worst"])


def test_metrics_agree_with_one_another(seen: Outcome, hf: Path) -> None:
    flops = MixtralConfig.from_hf_dir(hf).training_flops_per_token(SEQUENCE)
    for figures in seen.steps.values():
        assert figures["tokens"] == 4 * SEQUENCE
        assert figures["tokens_per_second"] == pytest.approx(figures["tokens"] / figures["step_seconds"])
        assert figures["tokens_per_second_per_device"] == pytest.approx(figures["tokens_per_second"] / 2)
        assert figures["mfu"] == pytest.approx(figures["tokens_per_second_per_device"] * flops / 0.5e12)
        assert 50 * 2**20 < figures["memory_bytes"] < 8 * 2**30, "resident memory of a rank"
    assert "| MFU " in seen.logs[-1] and "| z loss " in seen.logs[-1] and "| expert load " in seen.logs[-1]


def test_steps_that_the_loss_scaler_skips_are_counted(folder: Path, hf: Path, data: list[str]) -> None:
    """Gradients times 2^32 overflow in fp16: the scale falls to the least that is allowed, and then the run ends."""
    scale = ["--fp16", "--initial-loss-scale", str(2**32), "--min-loss-scale", str(2**30), "--max-nan-steps", "3"]
    argv = [*RECIPE, *data, "--hf-checkpoint", str(hf), "--global-batch-size", "2", "--train-iters", "20", *scale]
    found = pretrain(1, argv, folder / "fp16")
    assert found.codes != [0] and "3 steps in a row had a loss or gradient that is not finite" in found.logs[0]
    assert [(step["skipped_steps"], step["loss_scale"]) for step in found.steps.values()] == [
        (1, 2**32), (2, 2**31), (3, 2**30), (4, 2**30), (5, 2**30)]
    assert "| scale 2.14748e+09" in found.logs[0]
