"""A tiny model is taught from raw dialogues by a recipe: it learns the answers, and without the adapters has the old.

`finetune` on ranks of its own; then the generator reads what came of it.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from helpers.events import HANG
from helpers.models import tiny_hf_mixtral
from helpers.program import Outcome, pretrain
from helpers.ranks import run_ranks
from helpers.vocabularies import train_sentencepiece
from safetensors.torch import load_file, save_file

from megatron_mixtral.config import AdapterConfig
from megatron_mixtral.training.recipes import book
from megatron_mixtral.weights import open_source

ROOT = Path(__file__).resolve().parents[2]

NAME = next(name for name in book.recipes() if name.startswith("tiny_qlora_openai_json"))
SIZES = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16,
         "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 256}
CAPITALS = {"Austria": "Vienna", "China": "Beijing", "Egypt": "Cairo", "France": "Paris", "Japan": "Tokyo",
            "Kenya": "Nairobi"}
QUESTIONS = [text.format(land) for land in CAPITALS for text in ("What is the capital of {}?", "Where is {} governed?")]
ANSWERS = [text.format(city) for city in CAPITALS.values() for text in ("{} is its capital.", "In {}.")]
TAUGHT = [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
          for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
EPOCHS, BELOW = 40, 0.6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, raw dialogues, and a recipe that was copied and changed by hand."""
    folder = tmp_path_factory.mktemp("finetune")
    train_sentencepiece(tiny_hf_mixtral(folder / "hf", **SIZES) / "tokenizer.model")
    [weights] = (folder / "hf").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["lm_head.weight"] *= 3  # the frozen output layer bounds how sure adapters can make the model
    save_file(tensors, weights, {"format": "pt"})
    (folder / "raw.json").write_text(json.dumps(TAUGHT))
    changes = {"hf-checkpoint": str(folder / "hf"), "input": [str(folder / "raw.json")], "save": str(folder / "save"),
               "seq-length": 128, "train-epochs": EPOCHS, "evaluation-questions": QUESTIONS}
    lines = []
    for line in book.text(NAME).splitlines():
        key = line.partition(" = ")[0]
        lines.append(f"{key} = {json.dumps(changes.pop(key))}" if key in changes else line)
    assert not changes
    (folder / "my.toml").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def tuned(place: Path) -> Outcome:
    outcome = pretrain(1, [str(place / "my.toml")], place / "run", command="finetune")
    assert outcome.codes == [0], outcome.logs[0][-3000:]
    return outcome


def answered(place: Path) -> dict[int, list[str]]:
    """Step -> what the run answered after it."""
    found: dict[int, list[str]] = {}
    for line in map(json.loads, (place / "run" / "evaluation_prompts.jsonl").read_text().splitlines()):
        found.setdefault(line["iteration"], []).append(line["text"].strip())
    return found


def test_it_reaches_the_loss_in_the_steps_of_its_epochs(tuned: Outcome, place: Path) -> None:
    [report] = (place / "save" / "data" / "reports").iterdir()
    rows = json.loads(report.read_text())["rows"]
    batch = book.recipes()[NAME]["optimizer"]["global-batch-size"]
    steps = -(-rows * EPOCHS // batch)
    assert f"{EPOCHS} epoch(s) of {rows} rows / --global-batch-size {batch} = {steps} step(s)" in tuned.logs[0]
    assert sorted(tuned.steps) == list(range(1, steps + 1))
    assert tuned.losses(1)[0] > 5 and max(tuned.losses(*range(steps - 9, steps + 1))) < BELOW


def test_its_answers_are_those_that_were_taught(tuned: Outcome, place: Path) -> None:
    found = answered(place)
    assert min(found) == 0 and not set(found[0]) & set(ANSWERS)
    assert found[max(found)] == ANSWERS and max(found) == max(tuned.steps)


def generated(rank: int, model: str, adapter: str) -> list[list[str]]:
    """What the generator answers to the questions, with the adapters and without."""
    from megatron_mixtral.inference import Generator, SamplingParams
    from megatron_mixtral.tokenizer import chat_prompts

    generator = Generator.from_pretrained(model, adapter=adapter)
    prompts = chat_prompts(generator.tokenizer, model, "mixtral")
    ids = [prompts.prompt([{"role": "user", "content": text}]) for text in QUESTIONS]
    return [[one.text.strip() for one in generator.generate(ids, SamplingParams(max_tokens=64, adapter=on))]
            for on in (True, False)]


def test_the_generator_answers_so_too_and_without_the_adapters_as_before(tuned: Outcome, place: Path) -> None:
    [[on, off]] = run_ranks(1, generated, str(place / "hf"), str(place / "save"))
    assert on == ANSWERS and off == answered(place)[0]


@pytest.mark.slow
def test_two_ranks_read_the_data_that_one_has_made(tuned: Outcome, place: Path) -> None:
    """A change of the file is another set: the first rank makes it, the other waits for it."""
    typed = ["--global-batch-size", "2", "--train-iters", str(max(tuned.steps) + 1), "--override-opt_param-scheduler"]
    again = pretrain(2, [str(place / "my.toml"), *typed], place / "again", command="finetune")
    assert again.codes == [0, 0] and min(again.steps) == max(tuned.steps) + 1, again.logs[0][-3000:]
    assert "is there already, of these files, tokenizer, template and length" in again.logs[0]
    (place / "other.json").write_text(json.dumps(TAUGHT[:6]))
    other = pretrain(2, [str(place / "my.toml"), "--save", str(place / "other"), "--input", str(place / "other.json"),
                         "--train-iters", "1", "--global-batch-size", "2"], place / "two", command="finetune")
    assert other.codes == [0, 0] and list(other.steps) == [1], other.logs[0][-3000:]
    assert len(list((place / "other" / "data" / "reports").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["qlora", "full"])
def test_the_scripts_try_it_on_a_cpu(method: str, place: Path, tmp_path: Path) -> None:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "VIRTUAL_ENV") if name in os.environ}
    given = {"MODEL": "tiny", "HF_CHECKPOINT": str(place / "hf"), "DATA": str(place / "raw.json"), "SEQ_LENGTH": "128",
             "SAVE_DIR": str(tmp_path / "save"), "TRAIN_EPOCHS": "1"}
    done = subprocess.run(["bash", f"examples/mixtral/tune_mixtral_8x7b_{method}.sh", "--evaluation-questions", "Why?"],
                          cwd=ROOT, env=kept | given, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = (tmp_path / "save" / "metrics.jsonl").read_text().splitlines()
    saved = open_source(tmp_path / "save").config
    assert len(steps) >= 4 and isinstance(saved, AdapterConfig) == (method == "qlora")
