"""Runs that train adapters: resumed on other layouts, refused for another base, killed, exported, guarded."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import datasets
from helpers.adapters import greedy, peft_model, write_adapter
from helpers.events import until
from helpers.models import tiny_hf_mixtral
from helpers.program import Halt, Outcome, Running, pretrain
from helpers.ranks import run_ranks
from safetensors.torch import load_file
from transformers import MixtralForCausalLM

from megatron_mixtral import __main__ as commands
from megatron_mixtral.tokenizer import mixtral_tokenizer_path
from megatron_mixtral.weights import convert, open_sink, open_source
from megatron_mixtral.weights.adapters import fingerprint

STEPS, SAVED, RANK = 6, 3, 4
PROMPTS = [[5, 9, 13], [7] * 11, [80, 3, 44, 21], [61], [33, 34, 35, 36, 37]]
RECIPE = ["--seq-length", "32", "--micro-batch-size", "1", "--global-batch-size", "4", "--lr", "3e-3",
          "--lr-decay-style", "cosine", "--min-lr", "1e-4", "--lr-warmup-iters", "2", "--weight-decay", "0",
          "--clip-grad", "1.0", "--eval-iters", "0", "--train-iters", str(STEPS), "--lora-rank", str(RANK),
          "--lora-alpha", "8"]
SIZES = {"tp": "--tensor-model-parallel-size", "pp": "--pipeline-model-parallel-size", "cp": "--context-parallel-size",
         "ep": "--expert-model-parallel-size", "etp": "--expert-tensor-parallel-size",
         "vpp": "--num-virtual-stages-per-pipeline-rank"}
LAYOUTS = {  # name: (sizes, ranks)
    "one": ({}, 1), "tp2": ({"tp": 2}, 2), "pp2": ({"pp": 2}, 2), "vpp2": ({"pp": 2, "vpp": 2}, 2),
    "ep2": ({"ep": 2}, 2), "dp2": ({}, 2),
    "tp2-ep2": ({"tp": 2, "ep": 2, "etp": 1}, 2), "etp2": ({"tp": 2, "ep": 2, "etp": 2}, 4),
    "three": ({"tp": 2, "pp": 2, "ep": 2, "etp": 1}, 4),
    "cp2": ({"cp": 2}, 2), "ep2-cp2": ({"ep": 2, "cp": 2}, 2),
}
PAIRS = [("one", "tp2-ep2"), ("one", "pp2"), ("tp2-ep2", "one"), ("ep2", "tp2"), ("vpp2", "dp2"), ("dp2", "three"),
         ("three", "vpp2"), ("etp2", "ep2"), ("cp2", "one"), ("ep2-cp2", "tp2"), ("one", "ep2-cp2")]
EVERY_DAY = PAIRS[:1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def hf(folder: Path) -> Path:
    return tiny_hf_mixtral(folder / "hf")


@pytest.fixture(scope="module")
def start(folder: Path, hf: Path) -> list[str]:
    prefix = datasets.write_dataset(folder / "corpus_text_document", vocab_size=96)
    return [*RECIPE, "--hf-checkpoint", str(hf), "--data-path", prefix, "--split", "969, 30, 1", "--data-cache-path",
            str(folder / "cache")]


def run(layout: str, argv: list[str], folder: Path, distributed: bool = True) -> Outcome:
    sizes, world = LAYOUTS[layout]
    words = [word for axis, size in sizes.items() for word in (SIZES[axis], str(size))]
    return pretrain(world, [*argv, *words, *(["--use-distributed-optimizer"] if distributed else [])], folder)


def _prompts(folder: Path) -> Path:
    """Each of PROMPTS, with adapters and without."""
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt, "adapter": adapter, "max_tokens": 12, "ignore_eos": True})
                            + "\n" for prompt in PROMPTS for adapter in (True, False)))
    return file


@pytest.fixture(scope="module")
def whole(start: list[str], folder: Path) -> Callable[[str], tuple[Outcome, Path]]:
    """Six steps at a layout, saved after the third on the way; made once for a layout."""
    made: dict[str, tuple[Outcome, Path]] = {}

    def six(layout: str) -> tuple[Outcome, Path]:
        if layout not in made:
            place = folder / f"whole-{layout}"
            more = ["--save", str(place / "save"), "--save-interval", str(SAVED)]
            if not {"vpp", "cp"} & LAYOUTS[layout][0].keys():  # which answer no prompts
                more += ["--export-hf-interval", str(STEPS), "--evaluation-prompts", str(_prompts(folder)),
                         "--evaluation-interval", str(SAVED), "--tokenizer-model", str(mixtral_tokenizer_path())]
            made[layout] = (run(layout, [*start, *more], place), place / "save")
            assert not any(made[layout][0].codes), made[layout][0].logs[-1][-3000:]
        return made[layout]

    return six


@pytest.mark.parametrize("pair", [pytest.param(pair, marks=() if pair in EVERY_DAY else pytest.mark.slow)
                                  for pair in PAIRS], ids=" to ".join)
def test_resumes_on_another_layout(pair: tuple[str, str], whole: Callable, start: list[str], tmp_path: Path) -> None:
    before, after = pair
    first, save = whole(before)
    second = run(after, [*start, "--load", str(save), "--ckpt-step", str(SAVED)], tmp_path / "second")
    assert not any(second.codes), second.logs[-1][-3000:]
    steps = range(SAVED + 1, STEPS + 1)
    assert sorted(second.steps) == list(steps)
    assert second.losses(*steps) == pytest.approx(first.losses(*steps), rel=1e-6)
    assert second.norms(*steps) == pytest.approx(first.norms(*steps), rel=1e-5)


def test_the_checkpoint_and_the_export_of_a_run(whole: Callable, hf: Path, tmp_path: Path) -> None:
    """A checkpoint holds nothing but adapters and their optimizer; the folder beside it is the same adapters."""
    outcome, save = whole("one")
    assert "trains adapters of rank 4, alpha 8, on q_proj, k_proj, v_proj, o_proj, w1, w2, w3" in outcome.logs[0]
    source = open_source(save)
    source.check()
    assert source.config.base == fingerprint(open_source(hf)) and source.config.trained_parameters == 18_944
    exported = save / "hf" / "iter_0000006"
    convert(source, open_sink(tmp_path / "by-hand", "peft"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (exported / name).read_bytes() == (tmp_path / "by-hand" / name).read_bytes()
    said = json.loads((exported / "adapter_config.json").read_text())
    assert said["r"] == RANK and said["lora_alpha"] == 8 and said["lora_dropout"] == 0.0
    moved = [name for name, one in load_file(exported / "adapter_model.safetensors").items()
             if ".lora_B." in name and not one.any()]
    assert not moved, "every B has been trained"


@pytest.mark.parametrize("layout", ["one", pytest.param("tp2-ep2", marks=pytest.mark.slow),
                                    pytest.param("three", marks=pytest.mark.slow)])
def test_prompts_are_continued_as_adapters_are_trained(layout: str, whole: Callable, hf: Path, tmp_path: Path) -> None:
    """With them, as PEFT continues with what the run exports; without them, as the base does, before and after. And
    `generate` gives the same of the checkpoint.
    """
    outcome, save = whole(layout)
    file = next(iter(save.parent.rglob("evaluation_prompts.jsonl")))
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    assert [one["iteration"] for one in answers] == sorted([0, SAVED, STEPS] * 2 * len(PROMPTS))
    found = {step: [one["token_ids"] for one in answers if one["iteration"] == step] for step in (0, SAVED, STEPS)}
    models = (peft_model(hf, save / "hf" / "iter_0000006"), MixtralForCausalLM.from_pretrained(hf, dtype=torch.float32))
    trained, base = ([greedy(model, prompt, 12)[0] for prompt in PROMPTS] for model in models)
    assert found[0][::2] == base and all(found[step][1::2] == base for step in found)
    assert found[STEPS][::2] == trained != base

    argv = ["--load", str(hf), "--adapter", str(save), "--prompts-file", str(_prompts(tmp_path)), "--output",
            str(tmp_path / "answers.jsonl"), "--max-slots", "2"]
    assert run_ranks(1, _generate, argv) == [0]
    again = [json.loads(line)["token_ids"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert again == found[STEPS]


def _generate(rank: int, argv: list[str]) -> int:
    return commands.run("generate", argv)


@pytest.mark.parametrize(("flags", "words"), [
    pytest.param(["--lora-rank", "8"], "adapters with --lora-rank 4, this run has 8", marks=pytest.mark.slow),
    pytest.param(["--lora-alpha", "16"], "adapters with --lora-alpha 8, this run has 16", marks=pytest.mark.slow),
    (["--hf-checkpoint", "OTHER"], "on another base they mean nothing"),
])
def test_what_does_not_belong_together_is_refused(flags: list[str], words: str, whole: Callable, start: list[str],
                                                  folder: Path, tmp_path: Path) -> None:
    _, save = whole("one")
    other = folder / "other"
    if not other.exists():
        tiny_hf_mixtral(other, seed=1)
    given = [str(other) if word == "OTHER" else word for word in flags]
    refused = run("one", [*start, *given, "--load", str(save)], tmp_path)
    assert refused.codes == [1] and not refused.steps and words in refused.logs[0], refused.logs[0][-2000:]


@pytest.mark.slow
def test_a_whole_model_and_adapters_are_not_mixed_up(whole: Callable, start: list[str], tmp_path: Path) -> None:
    _, save = whole("one")
    at = start.index("--lora-rank")
    full = [*start[:at], *start[at + 4:]]
    refused = run("one", [*full, "--load", str(save)], tmp_path / "a")
    assert refused.codes == [1] and "holds adapters of rank 4, and this run trains the whole model" in refused.logs[0]
    more = ["--save", str(tmp_path / "full"), "--save-interval", "1", "--train-iters", "1",
            "--lr-warmup-iters", "0"]
    saved = run("one", [*full, *more], tmp_path / "b")
    assert saved.codes == [0], saved.logs[0][-2000:]
    refused = run("one", [*start, "--load", str(tmp_path / "full")], tmp_path / "c")
    assert refused.codes == [1] and "holds a whole model, and this run trains adapters" in refused.logs[0]


@pytest.mark.parametrize("layout", ["tp2-ep2", pytest.param("one", marks=pytest.mark.slow)])
def test_an_adapter_in_and_out_again_is_the_same_file(layout: str, start: list[str], hf: Path, tmp_path: Path) -> None:
    """A PEFT folder to begin with, a step with a learning rate of zero, and what the run exports."""
    adapter = write_adapter(tmp_path / "adapter", hf)
    more = ["--adapter", str(adapter), "--lr", "0", "--min-lr", "0", "--train-iters", "1", "--lr-warmup-iters", "0",
            "--save", str(tmp_path / "save"), "--save-interval", "1"]
    outcome = run(layout, [*start, *more], tmp_path / "run")
    assert not any(outcome.codes), outcome.logs[-1][-3000:]
    for source, target in ((adapter, "before"), (tmp_path / "save", "after")):
        convert(open_source(source), open_sink(tmp_path / target, "peft"))
    before, after = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("before", "after"))
    assert before == after


@pytest.mark.slow
@pytest.mark.parametrize("change", [1, 7, 15, 20, 24])
def test_killed_while_it_saves(change: int, whole: Callable, start: list[str], tmp_path: Path) -> None:
    """Kill -9 at a change to the second save: the same command goes on from a whole checkpoint, to the same numbers."""
    first, _ = whole("one")
    argv = [*start, "--use-distributed-optimizer", "--save", str(tmp_path / "save"), "--load", str(tmp_path / "save"),
            "--save-interval", "2", "--save-total-limit", "2"]
    running = Running(1, argv, tmp_path / "run", halt=Halt(0, saving=change))
    until(lambda: running.halted() or not running.alive())
    assert running.halted(), running.logs[0].read_text()[-3000:]
    running.signal(9)
    assert running.finish().codes == [-9]
    again = pretrain(1, argv, tmp_path / "again")
    assert again.codes == [0], again.logs[0][-3000:]
    steps = sorted(again.steps)
    assert steps[-1] == STEPS and again.losses(*steps) == first.losses(*steps)
    kept = sorted(path.name for path in (tmp_path / "save").glob("iter_*"))
    assert kept == ["iter_0000004", "iter_0000006"]


# -- What is not trained ends the run --------------------------------------------------------------------


def _without_the_hook() -> None:
    from megatron_mixtral.lora import apply

    apply._wants_a_gradient = lambda embedding, inputs, output: output


def _one_expert_skipped() -> None:
    from megatron_mixtral.lora import experts

    products = experts.AdaptedExperts._given

    def given(self, name: str) -> tuple:
        found = list(products(self, name))
        found[1] = found[1].detach()
        return tuple(found)

    experts.AdaptedExperts._given = given


def _nothing_is_stepped() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    DistributedOptimizer.step_with_ready_grads = lambda self: True


RECOMPUTED = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]


@pytest.mark.parametrize(("fault", "layout", "flags", "words"), [
    (_without_the_hook, "one", RECOMPUTED, "adapters have no gradient after the first step, first "
     "base_model.model.model.layers.0.self_attn.q_proj"),
    pytest.param(_without_the_hook, "pp2", RECOMPUTED, "adapters have no gradient after the first step",
                 marks=pytest.mark.slow),
    pytest.param(_one_expert_skipped, "one", [], "adapters have no gradient after the first step, first "
                 "base_model.model.model.layers.0.block_sparse_moe.experts.1.w1.lora_B", marks=pytest.mark.slow),
    pytest.param(_nothing_is_stepped, "one", [], "adapters have not changed", marks=pytest.mark.slow),
    pytest.param(_one_expert_skipped, "ep2-cp2", [], "adapters have no gradient after the first step, first "
                 "base_model.model.model.layers.0.block_sparse_moe.experts.1.w1.lora_B", marks=pytest.mark.slow),
], ids=["no hook", "no hook, pp2", "one expert skipped", "no step", "one expert skipped, ep2-cp2"])
def test_what_is_not_trained_ends_the_run(fault: Callable, layout: str, flags: list[str], words: str,
                                          start: list[str], tmp_path: Path) -> None:
    sizes, world = LAYOUTS[layout]
    given = [word for axis, size in sizes.items() for word in (SIZES[axis], str(size))]
    outcome = pretrain(world, [*start, *flags, *given, "--use-distributed-optimizer"], tmp_path, prepare=fault)
    assert any(outcome.codes) and len(outcome.steps) <= 2
    assert words in outcome.logs[0], outcome.logs[0][-3000:]


@pytest.mark.slow
def test_dropout_is_of_training_alone(start: list[str], hf: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", hf)
    at = start.index("--eval-iters")
    common = [*start[:at], *start[at + 2:], "--adapter", str(adapter), "--lr", "0", "--min-lr", "0", "--train-iters",
              "1", "--lr-warmup-iters", "0", "--eval-iters", "2", "--eval-interval", "1", "--split", "80, 10, 10"]
    plain, dropped = (run("one", [*common, "--lora-dropout", share], tmp_path / share) for share in ("0", "0.5"))
    assert plain.codes == dropped.codes == [0], dropped.logs[0][-2000:]
    assert plain.losses(1) != dropped.losses(1)
    losses = [re.findall(r"evaluation after step \d+ \| loss ([0-9.]+)", one.logs[0]) for one in (plain, dropped)]
    assert losses[0] and losses[0] == losses[1]


@pytest.mark.slow
def test_bf16_with_everything(start: list[str], hf: Path, tmp_path: Path) -> None:
    """bf16, 4 layouts, recomputation, overlap and dropout together: the guards are content and the loss falls."""
    more = ["--bf16", "--lora-dropout", "0.1", *RECOMPUTED, "--train-iters", "12", "--lr", "1e-2"]
    for layout in ("one", "tp2-ep2", "dp2", "three"):
        overlap = ["--overlap-grad-reduce", "--overlap-param-gather"] if layout == "dp2" else []
        outcome = run(layout, [*start, *more, *overlap], tmp_path / layout)
        assert not any(outcome.codes), outcome.logs[-1][-3000:]
        assert torch.tensor(outcome.losses(11, 12)).mean() < torch.tensor(outcome.losses(1, 2)).mean()
