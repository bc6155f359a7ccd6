"""Fine-tuning on instruction data: packed equals unpacked, answers only, in several layouts, as transformers does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import engine
from helpers.models import tiny_hf_mixtral
from helpers.program import pretrain
from helpers.ranks import run_ranks

from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.data.datasets import InstructionFiles
from megatron_mixtral.data.instruction import InstructionOptions, preprocess_instructions
from megatron_mixtral.tokenizer import mixtral_tokenizer_path
from megatron_mixtral.weights import convert, open_sink, open_source

SEQUENCE, BATCH, VOCABULARY = 96, 4, 32000
RECIPE = ["--is-instruction-dataset", "--seq-length", str(SEQUENCE), "--micro-batch-size", "1", "--global-batch-size",
          str(BATCH), "--lr", "3e-3", "--lr-decay-style", "constant", "--split", "1,0,0", "--eval-iters", "0",
          "--use-distributed-optimizer"]
TP2_PP2 = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("instruction")


@pytest.fixture(scope="module")
def hf(folder: Path) -> Path:
    return tiny_hf_mixtral(folder / "hf", vocab_size=VOCABULARY, max_position_embeddings=128)


@pytest.fixture(scope="module")
def sets(folder: Path) -> dict[str, str]:
    """The same samples, one a row, packed, and packed with room for padding each: prefixes."""
    records = [{"conversation": [{"input": f"Say {n}.", "output": " ".join(["word"] * (1 + n % 13))},
                                 {"input": "Again.", "output": f"Number {n}.", "loss": n % 5 != 0}]}
               for n in range(1, 61)]
    source = folder / "records.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    for name in ("single", "packed", "padded"):
        preprocess_instructions(InstructionOptions(
            inputs=(str(source),), output_prefix=str(folder / name), tokenizer_path=str(mixtral_tokenizer_path()),
            tokenizer_type="Llama2Tokenizer", handler="auto", seq_length=SEQUENCE, pack=name != "single",
            pad_to_multiple_of=4 if name == "padded" else 1))
    return {name: str(folder / name) for name in ("single", "packed", "padded")}


def _row_logits(rank: int, checkpoint: str, layout: dict[str, int], prefix: str, rows: list[int]) -> list[Any]:
    """For each sample of the rows: its tokens and the logits [positions, vocabulary] of the training batch."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_mixtral.data.datasets import row_tensors
    from megatron_mixtral.training.micro_batch import packed_params

    [model] = engine.load_stages(checkpoint, layout)
    files, found = InstructionFiles(prefix), []
    for number in rows:
        samples = files.row(number)
        batch = {name: tensor[None] for name, tensor in row_tensors(samples, SEQUENCE).items()}
        with torch.no_grad():
            packed = packed_params(batch, next(model.parameters()).device)
            logits = model(batch["tokens"], batch["position_ids"], None, packed_seq_params=packed,
                           padding_mask=batch["padding_mask"])
        start = 0
        for ids, _ in samples:
            logits_of = gather_from_tensor_model_parallel_region(logits)[0, start : start + len(ids) - 1]
            found.append((tuple(ids.tolist()), logits_of))
            start += len(ids) - 1
    return found


def test_a_packed_sample_has_the_logits_it_has_alone(folder: Path, hf: Path, sets: dict[str, str]) -> None:
    convert(open_source(hf), open_sink(folder / "ranks", "torch", ParallelLayout(tp=2)))
    packed = InstructionFiles(sets["packed"])
    rows = [number for number in range(len(packed)) if len(packed.row(number)) > 1][:4]
    arguments = (str(folder / "ranks"), {"tp": 2})
    together = run_ranks(2, _row_logits, *arguments, sets["packed"], rows)[0]
    wanted = {ids for ids, _ in together}
    single = InstructionFiles(sets["single"])
    same = [number for number in range(len(single)) if tuple(single.row(number)[0][0].tolist()) in wanted]
    alone = dict(run_ranks(2, _row_logits, *arguments, sets["single"], same)[0])
    assert len(together) >= 8 and wanted == set(alone)
    assert max(float((logits - alone[ids]).abs().max()) for ids, logits in together) < 1e-5


def _rows_read(rank: int, prefix: str, steps: int) -> list[dict[str, torch.Tensor]]:
    """The rows of the first steps, in the order in which a run reads them."""
    from megatron_mixtral.data.datasets import build_instruction

    train, _, _ = build_instruction((steps * BATCH, 0, 0), tokenizer=None, seq_length=SEQUENCE, seed=1234,
                            blend=([prefix], None), blend_per_split=None, split="1,0,0", cache=None,
                            is_built_on_rank=lambda: True)
    return [train[index] for index in range(steps * BATCH)]


def _expected(hf: Path, rows: list[dict[str, torch.Tensor]]) -> tuple[float, float]:
    """Loss and gradient norm of `transformers` on these rows, sample by sample, without padding or packing."""
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager").eval()
    total = sum(float(row["loss_mask"].sum()) for row in rows)
    loss = 0.0
    for row in rows:
        ends = row["cu_seqlens"][: int(row["samples"]) + 1].tolist()
        for start, end in zip(ends, ends[1:], strict=False):
            labels = torch.where(row["loss_mask"] > 0, row["labels"], -100)[start:end]
            logits = model(row["tokens"][None, start:end]).logits[0]
            part = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / total
            part.backward()
            loss += float(part.detach())
    return loss, float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9))


@pytest.mark.parametrize(("name", "world", "layout"), [
    ("single", 2, ["--expert-model-parallel-size", "2"]), ("packed", 4, TP2_PP2),
    ("padded", 2, ["--context-parallel-size", "2"]),
    pytest.param("single", 4, TP2_PP2, marks=pytest.mark.slow),
    pytest.param("packed", 2, ["--expert-model-parallel-size", "2"], marks=pytest.mark.slow)],
    ids=["single-ep2", "packed-tp2-pp2", "padded-cp2", "single-tp2-pp2", "packed-ep2"])
def test_the_first_step_is_that_of_transformers_and_the_loss_falls(
        name: str, world: int, layout: list[str], folder: Path, hf: Path, sets: dict[str, str]) -> None:
    steps = 8
    outcome = pretrain(world, [*RECIPE, *layout, "--data-path", sets[name], "--hf-checkpoint", str(hf),
                               "--moe-aux-loss-coeff", "0", "--train-iters", str(steps)], folder / f"{name}-{world}")
    assert all(code == 0 for code in outcome.codes), outcome.logs[-1][-3000:]
    [rows] = run_ranks(1, _rows_read, sets[name], 1)
    loss, norm = _expected(hf, rows)
    assert outcome.losses(1) == pytest.approx([loss], abs=1e-5)
    assert outcome.norms(1) == pytest.approx([norm], rel=1e-4)
    assert sum(outcome.losses(7, 8)) < 0.9 * sum(outcome.losses(1, 2))


def test_an_epoch_trains_every_answer_once_packed_or_not(sets: dict[str, str]) -> None:
    reports = {name: json.loads(Path(prefix).with_name("reports").joinpath(
        f"{Path(prefix).name}.report.json").read_text()) for name, prefix in sets.items()}
    assert reports["single"]["trained_tokens"] == reports["packed"]["trained_tokens"]
    for name, prefix in sets.items():
        epoch = -(-reports[name]["rows"] // BATCH) * BATCH
        [rows] = run_ranks(1, _rows_read, prefix, epoch // BATCH)
        trained = [float(row["loss_mask"].sum()) for row in rows[: reports[name]["rows"]]]
        assert sum(trained) == reports[name]["trained_tokens"] < reports[name]["tokens"] / 2


def _gradients(rank: int, checkpoint: str, seq_length: int, per_token: bool) -> list[Any]:
    """The gradients of two micro-batches of 12 trained and 18 other tokens, divided as a training step divides them."""
    import numpy as np
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.timers import Timers
    from megatron.training import global_vars

    from megatron_mixtral.data.datasets import row_tensors
    from megatron_mixtral.training.micro_batch import instruction_step

    global_vars._GLOBAL_TIMERS = Timers(0, "minmax")
    [model] = engine.load_stages(checkpoint, {}, calculate_per_token_loss=per_token, moe_aux_loss_coeff=3.0,
                                 moe_z_loss_coeff=0.5)
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(2):
        ids = rng.integers(3, VOCABULARY, 31).astype(np.int32)
        labels = np.where(np.arange(31) < 19, np.int32(-100), ids)
        rows.append({name: tensor[None] for name, tensor in row_tensors([(ids, labels)], seq_length).items()})
    get_forward_backward_func()(
        forward_step_func=instruction_step, data_iterator=iter(rows), model=model, num_microbatches=2,
        seq_length=seq_length, micro_batch_size=1, forward_only=False)
    return [parameter.grad / (2 * 12 if per_token else 1) for parameter in model.parameters()]


def _largest_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def test_balancing_losses_see_no_padding_and_keep_their_weight(folder: Path, hf: Path) -> None:
    """Where every micro-batch has as many trained tokens, a mean over tokens is one over micro-batches, also for the
    routers; and longer rows of padding change nothing."""
    convert(open_source(hf), open_sink(folder / "one", "torch", ParallelLayout()))
    arguments = (1, _gradients, str(folder / "one"))
    [plain] = run_ranks(*arguments, 32, False)
    assert _largest_difference(run_ranks(*arguments, 32, True)[0], plain) < 1e-4
    assert _largest_difference(run_ranks(*arguments, 64, False)[0], plain) < 1e-4


@pytest.mark.slow
def test_a_run_on_four_ranks_goes_on_as_one_rank_does(folder: Path, hf: Path, sets: dict[str, str]) -> None:
    """Balancing losses, validation and a resumption beyond the first epoch, with one set twice in a blend."""
    data = ["--data-path", "0.5", sets["packed"], "0.5", sets["packed"], "--split", "80,20,0", "--eval-iters", "1",
            "--eval-interval", "4", "--data-cache-path", str(folder / "cache")]
    argv = [*RECIPE, *data, "--hf-checkpoint", str(hf), "--moe-aux-loss-coeff", "0.5", "--train-iters", "8"]
    whole = pretrain(1, argv, folder / "whole")
    assert all(code == 0 for code in whole.codes), whole.logs[-1][-3000:]
    assert "validation loss at iteration 4" in whole.logs[0]
    run = [*argv, *TP2_PP2, "--load", str(folder / "run")]
    first = pretrain(4, [*run, "--save", str(folder / "run"), "--save-interval", "4", "--exit-interval", "4"],
                     folder / "first")
    second = pretrain(4, run, folder / "second")
    assert all(code == 0 for code in first.codes + second.codes), (first.logs[-1][-3000:], second.logs[-1][-3000:])
    assert sorted(first.steps) == [1, 2, 3, 4] and sorted(second.steps) == [5, 6, 7, 8]
    found = first.losses(1, 2, 3, 4) + second.losses(5, 6, 7, 8)
    assert found == pytest.approx(whole.losses(*range(1, 9)), abs=1e-4)
    assert first.norms(1) == pytest.approx(whole.norms(1), rel=1e-4)
