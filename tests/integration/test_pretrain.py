"""The training program as a whole: starts, continues, learns what plain torch learns, refuses what cannot be right."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import datasets
from helpers.mmlu import write_mmlu, write_task
from helpers.models import tiny_hf_mixtral
from helpers.program import Outcome, pretrain
from helpers.ranks import run_ranks
from helpers.vocabularies import write_letters

from megatron_mixtral.config import MixtralConfig, ParallelLayout
from megatron_mixtral.weights import convert, open_sink, open_source

SEQUENCE, BATCH, STEPS, LEARNING_RATE = 32, 4, 10, 3e-3
LAYOUT = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2",
          "--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"]
RECIPE = ["--seq-length", str(SEQUENCE), "--micro-batch-size", "1", "--global-batch-size", str(BATCH),
          "--lr", str(LEARNING_RATE), "--lr-decay-style", "constant", "--weight-decay", "0.01", "--adam-beta2", "0.95",
          "--clip-grad", "1.0", "--moe-aux-loss-coeff", "0", "--eval-iters", "0", "--use-distributed-optimizer"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pretrain")


@pytest.fixture(scope="module")
def hf(folder: Path) -> Path:
    return tiny_hf_mixtral(folder / "hf")


@pytest.fixture(scope="module")
def data(folder: Path) -> list[str]:
    prefix = datasets.write_dataset(folder / "corpus_text_document", vocab_size=96)
    return ["--data-path", prefix, "--split", "969, 30, 1", "--data-cache-path", str(folder / "cache")]


@pytest.fixture(scope="module")
def whole(folder: Path, hf: Path, data: list[str]) -> Outcome:
    """Ten steps from Hugging Face weights, uninterrupted, on 4 ranks."""
    return pretrain(4, [*LAYOUT, *RECIPE, *data, "--train-iters", str(STEPS), "--hf-checkpoint", str(hf)],
                    folder / "whole")


def ended_well(outcome: Outcome) -> bool:
    return all(code == 0 for code in outcome.codes)


def test_ten_steps_of_the_program_equal_plain_torch(whole: Outcome, folder: Path, hf: Path, data: list[str]) -> None:
    from transformers import MixtralForCausalLM

    assert ended_well(whole), whole.logs[-1][-3000:]
    wanted = (STEPS * BATCH, 0, 0)
    [rows] = run_ranks(1, datasets.samples, data[1], str(folder / "cache2"), SEQUENCE, wanted, STEPS * BATCH)
    model = MixtralForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager").eval()
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.01},
              {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for batch in rows.split(BATCH):
        optimizer.zero_grad()
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        losses.append(float(loss.detach()))
        optimizer.step()
    assert sum(losses[:3]) - sum(losses[-3:]) > 3 * 0.05, "the reference must learn something"
    assert whole.losses(*range(1, STEPS + 1)) == pytest.approx(losses, abs=1e-4)
    assert whole.norms(1) == pytest.approx(norms[:1], abs=1e-4)


@pytest.fixture(scope="module")
def stopped(folder: Path, hf: Path, data: list[str]) -> Outcome:
    """The same run, saved and stopped after five steps; its checkpoint is in `folder / "run"`."""
    save = ["--save", str(folder / "run"), "--load", str(folder / "run"), "--save-interval", "5"]
    argv = [*LAYOUT, *RECIPE, *data, *save, "--train-iters", str(STEPS), "--hf-checkpoint", str(hf)]
    return pretrain(4, [*argv, "--exit-interval", "5"], folder / "first")


def tasks_of_letters(folder: Path) -> list[str]:
    """Tasks that a model with a token for each letter can be asked; the flags that ask it."""
    write_letters(folder / "letters")
    write_mmlu(folder / "mmlu", ["anatomy"])
    write_task(folder / "tasks")
    return ["--eval-tasks", "mmlu,after", "--eval-data-path", str(folder / "mmlu" / "test"), "--eval-include-path",
            str(folder / "tasks"), "--eval-limit", "6", "--tokenizer-model", str(folder / "letters")]


def of_lm_eval(folder: Path, model: Path) -> dict[str, Any]:
    """What lm-eval's own backend for transformers makes of the same tasks."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from megatron_mixtral.evaluation import read_mmlu

    lm = HFLM(pretrained=str(model), tokenizer=str(folder / "letters"), dtype="float32", batch_size=1, device="cpu")
    tasks = TaskManager(include_defaults=False, include_path=str(folder / "tasks")).load(
        [*read_mmlu(folder / "mmlu").tasks().values(), "after"])
    return evaluate(lm, tasks, limit=6)["results"]


def test_prompts_and_tasks_leave_no_trace(whole: Outcome, folder: Path, hf: Path, data: list[str]) -> None:
    """Before the first step as transformers would; then as the model learns, with the same losses, bit for bit."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import MixtralForCausalLM

    prompts = [[5, 9, 13], [7] * 11]
    lines = "".join(json.dumps({"prompt": prompt, "max_tokens": 8, "ignore_eos": True}) + "\n" for prompt in prompts)
    (folder / "prompts.jsonl").write_text(lines)
    found = pretrain(4, [*LAYOUT, *RECIPE, *data, "--train-iters", str(STEPS), "--hf-checkpoint", str(hf),
                         "--evaluation-prompts", str(folder / "prompts.jsonl"), "--evaluation-interval", "4",
                         *tasks_of_letters(folder), "--tensorboard-dir", str(folder / "board")], folder / "prompts")
    assert ended_well(found), found.logs[-1][-3000:]
    steps = range(1, STEPS + 1)
    assert found.losses(*steps) == whole.losses(*steps) and found.norms(*steps) == whole.norms(*steps)
    assert [found.steps[step]["expert_imbalance"] for step in steps] == \
        [whole.steps[step]["expert_imbalance"] for step in steps]
    answers = [json.loads(line) for line in (folder / "prompts" / "evaluation_prompts.jsonl").read_text().splitlines()]
    assert [answer["iteration"] for answer in answers] == [0, 0, 4, 4, 8, 8, 10, 10]
    assert len({tuple(answer["token_ids"]) for answer in answers}) > 2 and 'step 8 | ' in found.logs[-1]
    model = MixtralForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    for prompt, answer in zip(prompts, answers, strict=False):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0,
                             eos_token_id=None)
        assert answer["token_ids"] == out[0, len(prompt):].tolist()
    tasks = [json.loads(line) for line in (folder / "prompts" / "evaluation_tasks.jsonl").read_text().splitlines()]
    assert [one["iteration"] for one in tasks] == [0, 4, 8, 10]
    assert tasks[0]["results"] == of_lm_eval(folder, hf), "accuracies and standard errors"
    names = {"eval/mmlu/acc": lambda one: one["groups"]["mmlu"]["acc,none"],
             "eval/after/acc": lambda one: one["results"]["after"]["acc,none"],
             "eval/after/acc_norm": lambda one: one["results"]["after"]["acc_norm,none"]}
    board = EventAccumulator(str(folder / "board"))
    board.Reload()
    for name, value in names.items():
        assert {step: figures[name] for step, figures in found.steps.items() if name in figures} == {
            one["iteration"]: value(one) for one in tasks[1:]}
        assert [(one.step, one.value) for one in board.Scalars(name)] == [
            (one["iteration"], pytest.approx(value(one))) for one in tasks]


def test_resumed_run_equals_uninterrupted(whole: Outcome, stopped: Outcome, folder: Path, hf: Path,
                                          data: list[str]) -> None:
    assert ended_well(stopped), stopped.logs[-1][-3000:]
    argv = [*LAYOUT, *RECIPE, *data, "--load", str(folder / "run"), "--train-iters", str(STEPS)]
    second = pretrain(4, [*argv, "--hf-checkpoint", str(hf)], folder / "second")
    assert ended_well(second), second.logs[-1][-3000:]
    assert sorted(second.steps) == [6, 7, 8, 9, 10], "it goes on where the checkpoint is, not from --hf-checkpoint"
    assert stopped.losses(*range(1, 6)) == whole.losses(*range(1, 6))
    assert second.losses(*range(6, 11)) == whole.losses(*range(6, 11))
    assert second.norms(6) == whole.norms(6)


@pytest.mark.parametrize(("world", "layout"), [
    (1, []),  # EP 2 -> 1: one optimizer where the checkpoint has two
    (2, ["--expert-model-parallel-size", "2"]),
    (2, ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"]),
])
def test_resumes_on_another_layout(world: int, layout: list[str], whole: Outcome, stopped: Outcome, folder: Path,
                                   data: list[str]) -> None:
    assert ended_well(stopped), stopped.logs[-1][-3000:]
    argv = [*layout, *RECIPE, *data, "--load", str(folder / "run"), "--train-iters", str(STEPS)]
    found = pretrain(world, argv, folder / "other")
    assert ended_well(found), found.logs[-1][-3000:]
    steps = range(6, 11)
    assert found.losses(*steps) == pytest.approx(whole.losses(*steps), rel=1e-5)
    assert found.norms(*steps) == pytest.approx(whole.norms(*steps), rel=1e-4)


def test_start_from_rank_directories_equals_start_from_hf(whole: Outcome, folder: Path, hf: Path,
                                                          data: list[str]) -> None:
    convert(open_source(hf), open_sink(folder / "ranks", "torch", ParallelLayout(tp=2, pp=2, ep=2, etp=1)))
    found = pretrain(4, [*LAYOUT, *RECIPE, *data, "--train-iters", "1", "--load", str(folder / "ranks")],
                     folder / "from_ranks")
    assert ended_well(found), found.logs[-1][-3000:]
    assert found.losses(1) == whole.losses(1)


def test_ranks_in_another_order_take_their_own_weights(whole: Outcome, folder: Path, hf: Path,
                                                       data: list[str]) -> None:
    """`--use-tp-pp-dp-mapping` makes ranks 0 and 1 the stages of one replica; else they are replicas of one stage."""
    found = pretrain(4, ["--pipeline-model-parallel-size", "2", "--use-tp-pp-dp-mapping", *RECIPE, *data,
                         "--train-iters", "2", "--hf-checkpoint", str(hf)], folder / "mapped")
    assert ended_well(found), found.logs[0][-3000:]
    assert found.losses(1, 2) == pytest.approx(whole.losses(1, 2), rel=1e-5)


@pytest.mark.parametrize("flag", ["--data-args-path", "--per-split-data-args-path"])
def test_data_that_a_file_names_are_read(flag: str, folder: Path, hf: Path, data: list[str]) -> None:
    prefix, cache = data[1], data[-2:]
    file = folder / f"{flag.strip('-')}.txt"
    if flag == "--data-args-path":
        file.write_text(f"{prefix}\n")
        same, split = ["--data-path", prefix], ["--split", "969, 30, 1"]
    else:
        file.write_text(f'{{"train": "1.0 {prefix}", "valid": null, "test": null}}')
        same, split = ["--train-data-path", "1.0", prefix], []
    argv = [*RECIPE, "--train-iters", "2", "--hf-checkpoint", str(hf), *split, *cache]
    found, expected = (pretrain(1, [*argv, *one], folder / "named") for one in ([flag, str(file)], same))
    assert ended_well(found) and ended_well(expected), found.logs[0][-3000:]
    assert found.losses(1, 2) == expected.losses(1, 2) and found.read == expected.read
    assert prefix in found.logs[0], "the checkpoint's arguments have the data themselves"


def test_metrics_of_a_step(whole: Outcome, hf: Path) -> None:
    for figures in whole.steps.values():
        tokens = BATCH * SEQUENCE
        rate = tokens / figures["step_seconds"] / 4
        assert figures["tokens_per_second_per_device"] == pytest.approx(rate)
        assert "aux_loss" not in figures, "a loss whose coefficient is 0 is not computed"
    config = MixtralConfig.from_hf_dir(hf)
    one = whole.steps[1]
    expected = one["tokens_per_second_per_device"] * config.training_flops_per_token(SEQUENCE) / 1e12
    assert one["model_tflops_per_device"] == pytest.approx(expected)
    assert [whole.steps[i]["consumed_samples"] for i in (1, 2, 10)] == [4, 8, 40]


def test_half_a_model_is_refused(folder: Path, hf: Path, data: list[str]) -> None:
    """The engine answers a failed strict load with a lenient one; ours must not."""
    convert(open_source(hf), open_sink(folder / "half", "torch", ParallelLayout()))
    file = next((folder / "half").rglob("model_optim_rng.pt"))
    state = torch.load(file, weights_only=False)
    del state["model"]["decoder.final_layernorm.weight"]
    torch.save(state, file)
    found = pretrain(1, [*RECIPE, *data, "--train-iters", "1", "--load", str(folder / "half")], folder / "half_log")
    assert found.codes != [0] and not found.steps
    assert "decoder.final_layernorm.weight" in found.logs[0] and "does not fit this model stage" in found.logs[0]


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--num-layers", "5"], "--num-layers 5 contradicts the model's num_layers 4"),
    (["--disable-bias-linear", "--rotary-base", "10000"], "--rotary-base 10000 contradicts the model's rotary_base"),
    (["--seq-length", "65"], "--seq-length 65 is longer than the model's max_position_embeddings 64"),
    (["--model", "tiny"], "they are different models"),
    (["--data-path", "nowhere_text_document"], "nowhere_text_document.bin does not exist"),
    pytest.param(["--log-memory-to-tensorboard"], "--log-memory-to-tensorboard needs a GPU",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
])
def test_what_cannot_be_right_is_refused(flags: list[str], sentence: str, folder: Path, hf: Path,
                                         data: list[str]) -> None:
    argv = [*RECIPE, *data, "--train-iters", "1", "--hf-checkpoint", str(hf), *flags]
    found = pretrain(1, argv, folder / "refused")
    assert found.codes == [1] and not found.steps
    assert sentence in found.logs[0]
    assert "Traceback" not in found.logs[0]


def test_a_run_that_stays_without_a_finite_loss_ends_with_its_samples(folder: Path, hf: Path, data: list[str]) -> None:
    """Weights that give NaN: every step is skipped, and after `--max-nan-steps` the run says what it read."""
    broken = folder / "broken"
    shutil.copytree(hf, broken)
    tensors = safetensors.torch.load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    safetensors.torch.save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    found = pretrain(2, ["--pipeline-model-parallel-size", "2", *RECIPE, *data, "--train-iters", "9", "--hf-checkpoint",
                         str(broken), "--max-nan-steps", "2"], folder / "nan")
    assert found.codes[1] == 1 and sorted(found.steps) == [1, 2]
    assert [found.steps[step]["lm_loss"] for step in (1, 2)] == [None, None]
    assert f"they read samples 0 to {2 * BATCH - 1} of the training set" in found.logs[1]
