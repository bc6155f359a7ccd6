"""Runs that train dense models: saved, exported as what they were, gone on with in another layout, tuned."""

import json
from pathlib import Path

import pytest
import torch
from helpers import datasets
from helpers.dense import tiny_dense
from helpers.models import tensors_of
from helpers.program import Outcome, pretrain

from megatron_mixtral.config import CONFIG_FILE
from megatron_mixtral.weights import hf_tensors, open_source

RECIPE = ["--seq-length", "32", "--micro-batch-size", "1", "--global-batch-size", "4", "--lr", "3e-3",
          "--lr-decay-style", "constant", "--weight-decay", "0.1", "--eval-iters", "0", "--use-distributed-optimizer"]
TP2_PP2 = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    prefix = datasets.write_dataset(folder / "corpus_text_document", vocab_size=96)
    return ["--data-path", prefix, "--split", "969, 30, 1", "--data-cache-path", str(folder / "cache")]


def run(world: int, argv: list[str], folder: Path) -> Outcome:
    found = pretrain(world, [*RECIPE, *argv], folder)
    assert not any(found.codes), found.logs[-1][-3000:]
    return found


def check_export(folder: Path, hf: Path) -> None:
    """The original's names, shapes and config.json, other numbers; in the run's own checkpoint routers of zeros."""
    export, old = tensors_of(folder / "hf" / "iter_0000004"), tensors_of(hf)
    assert {name: tensor.shape for name, tensor in export.items()} == {n: tensor.shape for n, tensor in old.items()}
    assert all((export[name] - old[name]).abs().max() > 1e-4 for name in old)
    assert (folder / "hf" / "iter_0000004" / "config.json").read_bytes() == (hf / "config.json").read_bytes()
    source = open_source(folder)
    routers = [source.fragments(one)[0].data for one in hf_tensors(source.config).values() if one.rule.name == "router"]
    assert len(routers) == 4 and not any(one.any() for one in routers), "a router was trained"


@pytest.mark.parametrize("kind", ["tied llama", pytest.param("internlm2", marks=pytest.mark.slow),
                                  pytest.param("mistral", marks=pytest.mark.slow)])
def test_a_dense_model_trains_and_leaves_as_what_it_was(kind, data, tmp_path) -> None:
    hf = tiny_dense(tmp_path / "start", kind)
    save = ["--save", str(tmp_path / "save"), "--load", str(tmp_path / "save"), "--save-interval", "2"]
    more = ["--export-hf-interval", "4"]
    found = run(1, [*data, *save, *more, "--hf-checkpoint", str(hf), "--train-iters", "4"], tmp_path / "log")
    assert f"{kind.split()[-1]} of" in found.logs[0] and "as a Mixtral of one expert" in found.logs[0]
    assert "aux_loss" not in found.steps[4] or not found.steps[4]["aux_loss"]
    check_export(tmp_path / "save", hf)
    identity = json.loads((tmp_path / "save" / CONFIG_FILE).read_text())
    assert identity["dense_config"] == (hf / "config.json").read_text()


@pytest.mark.slow
def test_a_dense_run_goes_on_in_another_layout(data, tmp_path) -> None:
    hf = tiny_dense(tmp_path / "start", "internlm2")
    whole = run(1, [*data, "--hf-checkpoint", str(hf), "--train-iters", "4", "--save", str(tmp_path / "save"),
                    "--save-interval", "2"], tmp_path / "whole")
    again = run(4, [*data, *TP2_PP2, "--load", str(tmp_path / "save"), "--ckpt-step", "2", "--train-iters", "4",
                    "--save", str(tmp_path / "more"), "--save-interval", "4", "--export-hf-interval", "4"],
                tmp_path / "again")
    assert again.losses(3, 4) == pytest.approx(whole.losses(3, 4), abs=1e-5)
    assert again.norms(3, 4) == pytest.approx(whole.norms(3, 4), rel=1e-5)
    check_export(tmp_path / "more", hf)


@pytest.mark.slow
def test_adapters_of_a_dense_model_are_trained_and_exported(data, tmp_path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    hf = tiny_dense(tmp_path / "start", "tied llama")
    lora = ["--lora-rank", "4", "--lora-alpha", "8", "--hf-checkpoint", str(hf), "--train-iters", "4"]
    one = run(1, [*data, *lora, "--save", str(tmp_path / "save"), "--save-interval", "4", "--export-hf-interval", "4"],
              tmp_path / "one")
    two = run(2, [*data, *lora, "--tensor-model-parallel-size", "2"], tmp_path / "two")
    assert two.losses(1, 2, 3, 4) == pytest.approx(one.losses(1, 2, 3, 4), abs=1e-5)
    ids = torch.arange(40).reshape(2, 20) * 7 % 96
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(hf).eval()
        plain = model(ids).logits
        tuned = PeftModel.from_pretrained(model, tmp_path / "save" / "hf" / "iter_0000004").eval()(ids).logits
    assert (tuned - plain).abs().max() > 1e-4
