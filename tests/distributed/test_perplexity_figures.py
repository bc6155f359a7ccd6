"""Perplexity in several layouts: transformers' on the same windows, and a run's own validation loss on its samples."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import datasets
from helpers.models import tiny_hf_mixtral
from helpers.program import pretrain
from helpers.ranks import run_ranks
from helpers.vocabularies import write_letters

from megatron_mixtral.data.datasets import InstructionFiles
from megatron_mixtral.data.indexed import IndexFile
from megatron_mixtral.data.instruction import InstructionOptions, preprocess_instructions

LAYOUTS = {  # name: (ranks, flags)
    "tp1": (1, []),
    "tp2-pp2-ep2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2",
                        "--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"]),
}
LENGTH, STRIDE, SEQUENCE, BATCH, ITERATIONS = 24, 7, 32, 4, 3
SPLIT = "800,195,5"
INSTRUCTIONS, ROW, INSTRUCTION_SPLIT = {"single": False, "packed": True}, 120, "50,50,0"  # kind: whether it is packed
TEXTS = ["Once upon a time, there was a model: it had never seen a letter before.", "abc", "", "A tale of (2) lines.\n"]
MEASURED = {  # name: flags
    "documents": ["--load", "hf", "--data-path", "data", "--max-length", str(LENGTH), "--stride", str(STRIDE)],
    "texts": ["--load", "hf", "--input", "a.txt", "b.jsonl", "--max-length", str(LENGTH)],
    "run": ["--load", "run", "--data-path", "data", "--seq-length", str(SEQUENCE), "--split", SPLIT, "--samples",
            str(BATCH * ITERATIONS), "--data-cache-path", "cache"],
    "other-seed": ["--load", "run", "--data-path", "data", "--seq-length", str(SEQUENCE), "--split", SPLIT,
                   "--samples", str(BATCH * ITERATIONS), "--seed", "5"],
    "epoch": ["--load", "run", "--data-path", "data", "--seq-length", str(SEQUENCE), "--split", SPLIT],
    **{f"{kind}-samples": ["--load", "hf", "--data-path", kind, "--is-instruction-dataset", "--max-length",
                           str(ROW if kind == "single" else LENGTH)] for kind in INSTRUCTIONS},
    **{f"{kind}-run": ["--load", "hf", "--data-path", kind, "--is-instruction-dataset", "--seq-length", str(ROW),
                       "--split", INSTRUCTION_SPLIT, "--samples", str(BATCH * ITERATIONS)] for kind in INSTRUCTIONS},
}
ON_FOUR = ("documents", "texts", "run", "single-samples", "packed-run")


def work_off(rank: int, folder: str, layouts: dict[str, list[str]], names: list[str]) -> None:
    import os

    from megatron.core import parallel_state

    from megatron_mixtral import __main__ as commands

    os.chdir(folder)
    for layout, flags in layouts.items():
        for name in names:
            parallel_state.destroy_model_parallel()
            assert commands.run("perplexity", [*MEASURED[name], *flags, "--output", f"{layout}/{name}.json"]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("figures")
    write_letters(tiny_hf_mixtral(found / "hf", max_position_embeddings=128))
    datasets.write_dataset(found / "data", vocab_size=96)
    write_instructions(found)
    (found / "a.txt").write_text(TEXTS[0])
    (found / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[1:]))
    return found


def write_instructions(folder: Path) -> None:
    """The same dialogues, one a row, and packed. Of some the second answer is not trained, and nothing behind it."""
    second = {"input": "Again.", "output": "No more."}
    records = [{"conversation": [{"input": f"Say {n}.", "output": "word " * (1 + n % 7)},
                                 *[second | {"loss": n % 2 == 0}] * (n % 3 == 0)]} for n in range(60)]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for kind, pack in INSTRUCTIONS.items():
        preprocess_instructions(InstructionOptions(
            inputs=(str(folder / "records.jsonl"),), output_prefix=str(folder / kind), seq_length=ROW, pack=pack,
            tokenizer_path=str(folder / "hf"), tokenizer_type="HuggingFaceTokenizer", handler="auto"))


@pytest.fixture(scope="module")
def validation_loss(folder: Path) -> float:
    """Of a run's first evaluation, after its second step, in whose checkpoint the weights are."""
    done = pretrain(1, [
        "--hf-checkpoint", str(folder / "hf"), "--tokenizer-model", str(folder / "hf"), "--data-path",
        str(folder / "data"), "--split", SPLIT, "--data-cache-path", str(folder / "cache"), "--seq-length",
        str(SEQUENCE), "--micro-batch-size", "2", "--global-batch-size", str(BATCH), "--train-iters", "2", "--lr",
        "1e-2", "--eval-iters", str(ITERATIONS), "--eval-interval", "2", "--save", str(folder / "run"),
        "--save-interval", "2"], folder / "training")
    assert done.codes == [0], done.logs[0][-3000:]
    return float(re.search(r"evaluation after step 2 \| loss ([0-9.]+)", done.logs[0])[1])


@pytest.fixture(scope="module")
def found(folder: Path, validation_loss: float) -> dict[str, dict[str, Any]]:
    for world in (1, 4):
        layouts = {name: flags for name, (ranks, flags) in LAYOUTS.items() if ranks == world}
        names = [*MEASURED] if world == 1 else ON_FOUR
        run_ranks(world, work_off, str(folder), layouts, names)
    return {name: {path.stem: json.loads(path.read_text())["results"] for path in (folder / name).glob("*.json")}
            for name in LAYOUTS}


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, dict[str, float]]:
    """By transformers, in the loop of its guide; `nats` and `tokens` of the documents and of each file of texts."""
    from transformers import AutoTokenizer, MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    tokenizer, index = AutoTokenizer.from_pretrained(folder / "hf"), IndexFile(str(folder / "data"))

    def score(rows: list[list[int]], stride: int) -> dict[str, float]:
        nats, tokens = 0.0, 0
        for ids in rows:
            done = 0
            for begin in range(0, len(ids), stride):
                end = min(begin + LENGTH + 1, len(ids))
                labels = torch.tensor([ids[begin:end]])
                labels[:, :-(end - done)] = -100
                with torch.no_grad():
                    logits = model(torch.tensor([ids[begin:end]])).logits[0, :-1]
                wanted = labels[0, 1:]
                nats += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").double())
                tokens += int((wanted != -100).sum())
                done = end
                if end == len(ids):
                    break
        return {"nats": nats, "tokens": tokens}

    rows = [[1, *index.sequence(number).tolist()] for number in range(len(index))]
    return {"data": score(rows, STRIDE), "a.txt": score([tokenizer(TEXTS[0]).input_ids], LENGTH),
            "b.jsonl": score([tokenizer(text).input_ids for text in TEXTS[1:] if text], LENGTH)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_is_that_of_transformers(layout, found, expected) -> None:
    ours = found[layout]["documents"] | found[layout]["texts"]
    for name, reference in expected.items():
        assert ours[name]["tokens"] == reference["tokens"]
        loss = reference["nats"] / reference["tokens"]
        assert ours[name]["loss"] == pytest.approx(loss, rel=1e-5)
        assert ours[name]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert ours["data"]["tokens"] > 10_000 and ours["data"]["passages"] == 200
    texts = sum(len(text) for text in TEXTS)
    assert ours["all"]["bytes"] == texts and ours["all"]["passages"] == 3
    nats = expected["a.txt"]["nats"] + expected["b.jsonl"]["nats"]
    assert ours["all"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / texts, rel=1e-5)
    assert ours["all"]["byte_perplexity"] == pytest.approx(math.exp(nats / texts), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_of_a_runs_samples_is_its_validation_loss(layout, found, validation_loss) -> None:
    [ours] = found[layout]["run"].values()
    assert (ours["passages"], ours["tokens"]) == (BATCH * ITERATIONS, BATCH * ITERATIONS * SEQUENCE)
    assert ours["loss"] == pytest.approx(validation_loss, rel=1e-5)


def test_other_samples_have_another_loss(found, validation_loss, folder) -> None:
    losses = {name: one["loss"] for name in ("other-seed", "epoch") for one in found["tp1"][name].values()}
    assert all(abs(loss - validation_loss) > 2e-5 * validation_loss for loss in losses.values()), losses
    index = IndexFile(str(folder / "data"))
    first, end = 160, 199  # of 200 documents, by the split
    tokens = int(index.lengths[first:end].sum())
    [whole] = found["tp1"]["epoch"].values()
    assert whole["passages"] == (tokens - 1) // SEQUENCE


@pytest.fixture(scope="module")
def validation_losses(folder: Path) -> dict[str, float]:
    """Of runs on instruction data, whose one step changes nothing."""
    found = {}
    for kind in INSTRUCTIONS:
        done = pretrain(1, [
            "--hf-checkpoint", str(folder / "hf"), "--is-instruction-dataset", "--data-path", str(folder / kind),
            "--split", INSTRUCTION_SPLIT, "--seq-length", str(ROW), "--micro-batch-size", "1", "--global-batch-size",
            str(BATCH), "--train-iters", "1", "--lr", "0", "--eval-iters", str(ITERATIONS), "--eval-interval", "1"],
            folder / f"tuning-{kind}")
        assert done.codes == [0], done.logs[0][-3000:]
        found[kind] = float(re.search(r"evaluation after step 1 \| loss ([0-9.]+)", done.logs[0])[1])
    return found


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[tuple[int, ...], tuple[float, int]]:
    """Of each sample its nats and its trained tokens, by transformers with labels of -100."""
    from transformers import MixtralForCausalLM

    model, files = MixtralForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval(), {}
    for number in range(len(rows := InstructionFiles(str(folder / "single")))):
        [(ids, labels)] = rows.row(number)
        with torch.no_grad():
            loss = model(torch.tensor(ids)[None].long(), labels=torch.tensor(labels)[None].long()).loss
        files[tuple(ids.tolist())] = float(loss) * int((labels[1:] != -100).sum()), int((labels[1:] != -100).sum())
    return files


@pytest.mark.parametrize("layout", LAYOUTS)
def test_instruction_data_are_scored_as_transformers_scores_labels(layout, found, trained) -> None:
    [ours] = found[layout]["single-samples"].values()
    tokens = sum(count for _, count in trained.values())
    assert (ours["passages"], ours["tokens"]) == (60, tokens) and "bytes" not in ours
    assert ours["loss"] == pytest.approx(sum(nats for nats, _ in trained.values()) / tokens, rel=1e-5)


def test_instruction_data_in_windows(found) -> None:
    """Every trained token is scored once, with less before it."""
    [whole], [cut] = found["tp1"]["single-samples"].values(), found["tp1"]["packed-samples"].values()
    assert (cut["passages"], cut["tokens"]) == (whole["passages"], whole["tokens"])
    assert abs(cut["loss"] - whole["loss"]) > 1e-4


@pytest.mark.parametrize("kind", INSTRUCTIONS)
def test_loss_of_instruction_data_is_the_runs_validation_loss(kind, found, validation_losses, folder) -> None:
    [ours] = found["tp1"][f"{kind}-run"].values()
    assert ours["loss"] == pytest.approx(validation_losses[kind], rel=1e-5)
    assert ours["passages"] == BATCH * ITERATIONS if kind == "single" else ours["passages"] > 1.5 * BATCH * ITERATIONS
    if kind == "packed":
        [cut] = found["tp2-pp2-ep2"]["packed-run"].values()
        assert cut["loss"] == pytest.approx(validation_losses[kind], rel=1e-5) and cut["tokens"] == ours["tokens"]
