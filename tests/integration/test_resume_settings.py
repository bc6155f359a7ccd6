"""A run that goes on with other settings of its optimizer does what its flags say, as plain torch does it.

Each rank notes its weights and gradients of every step. The referee is torch's own optimizer with a schedule that is
written down here, given the same gradients from the first step on, with the first run's settings and then the second's.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import datasets
from helpers.models import tiny_hf_mixtral
from helpers.program import Outcome, pretrain

BATCH, STEPS, SAVED = 4, 6, 3
COMMON = ["--seq-length", "32", "--micro-batch-size", "1", "--global-batch-size", str(BATCH), "--clip-grad", "0",
          "--eval-iters", "0", "--train-iters", str(STEPS)]


@dataclass(frozen=True)
class Settings:
    """Of the optimizer and its schedule, in steps."""

    lr: float = 3e-3
    min_lr: float = 1e-4
    style: str = "cosine"
    warm_up: int = 2
    decay: int = STEPS
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def flags(self) -> list[str]:
        words = {"lr": self.lr, "min-lr": self.min_lr, "lr-decay-style": self.style, "lr-warmup-iters": self.warm_up,
                 "lr-decay-iters": self.decay, "weight-decay": self.weight_decay, "adam-beta1": self.betas[0],
                 "adam-beta2": self.betas[1], "adam-eps": self.eps}
        return [word for name, value in words.items() for word in (f"--{name}", str(value))]

    def rate(self, done: int) -> float:
        """The learning rate of the step after `done` steps."""
        if done <= self.warm_up:
            return self.lr * done / self.warm_up
        ratio = (done - self.warm_up) / (self.decay - self.warm_up)
        share = {"linear": 1 - ratio, "cosine": (1 + math.cos(math.pi * ratio)) / 2}[self.style]
        return self.min_lr + share * (self.lr - self.min_lr)


FIRST = Settings()
SECOND = Settings(lr=1e-3, min_lr=3e-4, style="linear", warm_up=1, decay=8, weight_decay=0.4, betas=(0.7, 0.8),
                  eps=1e-3)
RANKS = 2
LAYOUTS = {
    "tp 2, distributed optimizer": ["--tensor-model-parallel-size", "2", "--use-distributed-optimizer"],
    "ep 2": ["--expert-model-parallel-size", "2"],
}


def note_steps(folder: Path) -> None:
    """Have each rank write, for every step, (weights before, gradients, weights after) by parameter name."""
    from megatron.training import training

    train_step, steps = training.train_step, []

    def noted(forward_step: Any, data: Any, model: list[Any], *args: Any, **kwargs: Any) -> Any:
        parameters = dict(model[0].named_parameters())
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        result = train_step(forward_step, data, model, *args, **kwargs)
        steps.append((before, {name: one.main_grad.clone() for name, one in parameters.items()},
                      {name: one.detach().clone() for name, one in parameters.items()}))
        torch.save(steps, folder / f"steps{torch.distributed.get_rank()}.pt")
        return result

    training.train_step = noted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settings")


@pytest.fixture(scope="module")
def start(folder: Path) -> list[str]:
    prefix = datasets.write_dataset(folder / "corpus_text_document", vocab_size=96)
    return [*COMMON, "--hf-checkpoint", str(tiny_hf_mixtral(folder / "hf")), "--data-path", prefix, "--split",
            "969, 30, 1", "--data-cache-path", str(folder / "cache")]


def run(argv: list[str], place: Path, world: int = RANKS) -> Outcome:
    place.mkdir(parents=True, exist_ok=True)
    outcome = pretrain(world, argv, place, prepare=partial(note_steps, place))
    assert set(outcome.codes) == {0}, outcome.logs[-1][-3000:]
    return outcome


@pytest.fixture(scope="module")
def saved(folder: Path, start: list[str]) -> Any:
    """The folder of a first run of six steps at a layout, saved after the third; each made once."""
    made: dict[str, Path] = {}

    def place_of(name: str) -> Path:
        if name not in made:
            made[name] = folder / f"first{len(made)}"
            run([*start, *LAYOUTS[name], *FIRST.flags(), "--save", str(made[name] / "save"), "--save-interval",
                 str(SAVED)], made[name])
        return made[name]

    return place_of


@pytest.fixture(scope="module")
def changed(folder: Path, start: list[str], saved: Any) -> Any:
    """The outcome and folder of a run that goes on at the same layout with the second settings; each made once."""
    made: dict[str, Outcome] = {}

    def outcome_of(name: str) -> tuple[Outcome, Path]:
        place = saved(name) / "changed"
        if name not in made:
            made[name] = run([*start, *LAYOUTS[name], *SECOND.flags(), *going_on(saved(name))], place)
        return made[name], place

    return outcome_of


def going_on(first: Path) -> list[str]:
    return ["--load", str(first / "save"), "--ckpt-step", str(SAVED)]


def assert_as_plain_torch(first: Path, second: Path, settings: Settings) -> None:
    """Of the steps up to `SAVED` of one folder, and those of the other after it."""
    for rank in range(RANKS):
        steps = torch.load(first / f"steps{rank}.pt")[:SAVED] + torch.load(second / f"steps{rank}.pt")
        weights = {name: torch.nn.Parameter(value.clone()) for name, value in steps[0][0].items()}
        groups = [{"params": [one for one in weights.values() if (one.dim() == 1) == bare]} for bare in (False, True)]
        optimizer = torch.optim.AdamW(groups)
        for done, (_, gradients, after) in enumerate(steps):
            now = FIRST if done < SAVED else settings
            for group, decay in zip(optimizer.param_groups, (now.weight_decay, 0.0), strict=True):
                group.update(lr=now.rate(done), weight_decay=decay, betas=now.betas, eps=now.eps)
            for name, weight in weights.items():
                weight.grad = gradients[name]
            optimizer.step()
            for name, weight in weights.items():
                torch.testing.assert_close(weight.detach(), after[name], rtol=1e-5, atol=1e-7, msg=f"{done} {name}")
        assert done == STEPS - 1 and any(one.dim() == 1 for one in weights.values())


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_settings_are_followed_as_plain_torch_does(name: str, saved: Any, changed: Any) -> None:
    found, place = changed(name)
    assert_as_plain_torch(saved(name), place, SECOND)
    rates = [found.steps[step]["learning_rate"] for step in range(SAVED + 1, STEPS + 1)]
    assert rates == pytest.approx([SECOND.rate(step) for step in range(SAVED + 1, STEPS + 1)])
    said = next(line for line in found.logs[0].splitlines() if "resume: the optimizer goes on with the" in line)
    for words in ("--lr was 0.003, now it is 0.001", "--min-lr was 0.0001, now it is 0.0003",
                  "--lr-decay-style was cosine, now it is linear", "--lr-decay-iters was 6, now it is 8",
                  "--lr-warmup-iters was 2, now it is 1", "--weight-decay was 0.01, now it is 0.4",
                  "--adam-beta1 was 0.9, now it is 0.7", "--adam-eps was 1e-08, now it is 0.001"):
        assert words in said


def test_other_settings_on_another_layout(start: list[str], saved: Any, changed: Any, tmp_path: Path) -> None:
    """With expert parallelism the engine keeps two optimizers, without it one; what is learned is the same."""
    two, _ = changed("ep 2")
    one = run([*start, *SECOND.flags(), *going_on(saved("ep 2"))], tmp_path)
    steps = range(SAVED + 1, STEPS + 1)
    assert one.losses(*steps) == pytest.approx(two.losses(*steps), rel=1e-5)
    assert one.norms(*steps) == pytest.approx(two.norms(*steps), rel=1e-5)


def test_the_schedule_of_the_checkpoint_can_be_kept(start: list[str], saved: Any, tmp_path: Path) -> None:
    """`--use-checkpoint-opt_param-scheduler`: rates, lengths, style and weight decay stay; betas and eps are flags."""
    name = "tp 2, distributed optimizer"
    found = run([*start, *LAYOUTS[name], *SECOND.flags(), *going_on(saved(name)),
                 "--use-checkpoint-opt_param-scheduler"], tmp_path)
    assert_as_plain_torch(saved(name), tmp_path, Settings(betas=SECOND.betas, eps=SECOND.eps))
    assert "resume: --use-checkpoint-opt_param-scheduler keeps --lr 0.003 (not 0.001), --min-lr" in found.logs[0]
    assert "the settings of the flags: --adam-beta1 was 0.9, now it is 0.7; --adam-beta2" in found.logs[0]


def test_sgd_goes_on(start: list[str], tmp_path: Path) -> None:
    flags = [*start, *FIRST.flags(), "--optimizer", "sgd"]
    whole = run([*flags, "--save", str(tmp_path / "save"), "--save-interval", str(SAVED)], tmp_path, world=1)
    rest = run([*flags, *going_on(tmp_path)], tmp_path / "second", world=1)
    steps = range(SAVED + 1, STEPS + 1)
    assert rest.losses(*steps) == whole.losses(*steps) and rest.norms(*steps) == whole.norms(*steps)
