"""One run of the program with a recipe in which everything matters, against plain torch and the engine's own datasets.

The model has no size or setting that is a default of the engine, learning rate, weight decay, blend, seed and end of
documents change the numbers, and the judge takes the flags at their word: what is left out on the way to the engine,
or comes a step too early, shows in a loss, a learning rate or a weight.
"""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.datasets import write_dataset
from helpers.models import tensors_of, tiny_hf_mixtral
from helpers.program import Outcome, pretrain
from helpers.ranks import run_ranks

from megatron_mixtral.weights import convert, open_sink, open_source

SEQUENCE, BATCH, STEPS, EOD, SEED, SPLIT = 32, 4, 5, 2, 7, "60,30,10"
LR, MIN_LR, WARMUP, DECAY, WEIGHT_DECAY, BETAS, EPS, CLIP = 4e-3, 1e-3, 2, 6, 0.3, (0.8, 0.9), 1e-5, 0.5
MODEL = {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}, "sliding_window": 9,
         "head_dim": 16}
WEIGHTS = {"0.8": 0.8, "0.2": 0.2}
RECIPE = (f"--seq-length {SEQUENCE} --micro-batch-size 1 --global-batch-size {BATCH} --train-iters {STEPS} --lr {LR} "
          f"--min-lr {MIN_LR} --lr-decay-style cosine --lr-warmup-iters {WARMUP} --lr-decay-iters {DECAY} "
          f"--weight-decay {WEIGHT_DECAY} --adam-beta1 {BETAS[0]} --adam-beta2 {BETAS[1]} --adam-eps {EPS} --clip-grad "
          f"{CLIP} --moe-aux-loss-coeff 0 --seed {SEED} --eod-mask-loss --split {SPLIT} --eval-interval {STEPS} "
          f"--eval-iters 1 --save-interval {STEPS} --use-distributed-optimizer").split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipe")


@pytest.fixture(scope="module")
def prefixes(folder: Path) -> list[str]:
    return [write_dataset(folder / f"{name}_text_document", vocab_size=96, seed=seed, end=EOD)
            for seed, name in enumerate("ab")]


@pytest.fixture(scope="module")
def run(folder: Path, prefixes: list[str]) -> Outcome:
    hf = tiny_hf_mixtral(folder / "hf", **MODEL)
    blend = [word for pair in zip(WEIGHTS, prefixes, strict=True) for word in pair]
    outcome = pretrain(1, [*RECIPE, "--hf-checkpoint", str(hf), "--data-path", *blend, "--save", str(folder / "run")],
                       folder / "log")
    assert outcome.codes == [0], outcome.logs[0][-3000:]
    return outcome


def _engine_samples(rank: int, prefixes: list[str], sizes: list[int]) -> list[list[dict[str, torch.Tensor]]]:
    """The samples of each split by the engine alone, told what the flags say."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    tokenizer: Any = SimpleNamespace(eod=EOD, vocab_size=96, unique_identifiers={})
    config = GPTDatasetConfig(random_seed=SEED, sequence_length=SEQUENCE, blend=(prefixes, list(WEIGHTS.values())),
                              split=SPLIT, tokenizer=tokenizer, reset_position_ids=False, reset_attention_mask=False,
                              eod_mask_loss=True, create_attention_mask=False)
    built = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    return [[part[index] for index in range(size)] for part, size in zip(built, sizes, strict=True)]


def _rate(step: int) -> float:
    """Of the update of a step, from 1: as many steps lie behind it as the schedule has taken."""
    done = step - 1
    if done <= WARMUP:
        return LR * done / WARMUP
    return MIN_LR + (LR - MIN_LR) * 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (DECAY - WARMUP)))


def _losses(model: Any, rows: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, float]:
    """(The mean over micro-batches of one sample of their means over the tokens that are not behind an end, which is
    trained; the mean over all these tokens, which is logged.)
    """
    kept = []
    for row in rows:
        mask = row["tokens"] != EOD
        assert torch.equal(mask, row["loss_mask"] > 0)
        logits = model(row["tokens"][None]).logits[0]
        kept.append(torch.nn.functional.cross_entropy(logits, row["labels"], reduction="none")[mask])
    return torch.stack([one.mean() for one in kept]).mean(), float(torch.cat(kept).detach().mean())


@pytest.fixture(scope="module")
def expected(folder: Path, run: Outcome, prefixes: list[str]) -> SimpleNamespace:
    from transformers import MixtralForCausalLM

    train, valid, test = run_ranks(1, _engine_samples, prefixes, [STEPS * BATCH, 2 * BATCH, BATCH])[0]
    model = MixtralForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, attn_implementation="eager").eval()
    named = dict(model.named_parameters())
    vectors = {name for name in named if name.endswith("norm.weight")}
    groups = [{"params": [p for name, p in named.items() if name not in vectors], "weight_decay": WEIGHT_DECAY},
              {"params": [named[name] for name in sorted(vectors)], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
    losses = []
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss, logged = _losses(model, train[(step - 1) * BATCH:step * BATCH])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = _rate(step)
        optimizer.step()
        losses.append(logged)
    with torch.no_grad():
        held_out = [_losses(model, rows)[1] for rows in (valid[:BATCH], valid[BATCH:], test)]
    return SimpleNamespace(losses=losses, held_out=held_out, model=model)


def test_losses_and_rates_are_those_of_plain_torch(run: Outcome, expected: SimpleNamespace) -> None:
    """Blend, seed, split, window, epsilon and end of documents decide about the first two, before a weight changes."""
    assert run.losses(*range(1, STEPS + 1)) == pytest.approx(expected.losses, abs=2e-5)
    # The engine logs a rate when the step is done: that of the next one.
    assert [run.steps[step]["learning_rate"] for step in range(1, STEPS + 1)] == pytest.approx(
        [_rate(step + 1) for step in range(1, STEPS + 1)])


def test_what_is_held_out_is_the_splits(run: Outcome, expected: SimpleNamespace) -> None:
    """Once at the interval and once at the end, on the samples that follow; then the test split."""
    found = re.findall(r"validation loss at iteration \d+(?: on \w+ set)? \| lm loss value: (\S+)", run.logs[0])
    assert [float(value) for value in found] == pytest.approx(expected.held_out, abs=1e-4)


def test_weights_are_those_of_plain_torch(run: Outcome, folder: Path, expected: SimpleNamespace) -> None:
    """Decay of matrices alone, rates, betas and clipping, in every weight; saved and exported."""
    convert(open_source(folder / "run"), open_sink(folder / "back"))
    expected.model.save_pretrained(folder / "expected")
    ours, theirs = tensors_of(folder / "back"), tensors_of(folder / "expected")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < 5e-5, name
    before = tensors_of(folder / "hf")
    assert all((ours[name] - before[name]).abs().max() > 1e-3 for name in ours if "experts" not in name)
