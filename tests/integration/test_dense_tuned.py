"""A dense model is tuned by a recipe with QLoRA, and used: generated from, served, talked to, merged, read by PEFT.

What it has to say is PEFT's, on the model as bitsandbytes rounds it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import greedy
from helpers.dense import tiny_dense
from helpers.events import HANG
from helpers.models import nf4_rounded, tensors_of
from helpers.program import pretrain
from helpers.ranks import run_ranks
from helpers.serving import Served
from helpers.vocabularies import train_sentencepiece

from megatron_mixtral import __main__ as commands
from megatron_mixtral.tokenizer import chat_prompts, load_tokenizer
from megatron_mixtral.training.recipes import book

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SIZES = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
         "max_position_embeddings": 256}  # at tp2 the share of a row is a whole block of 4 bits
QUESTION, TEMPLATE, NEW = "Which number is it?", "llama2", 16


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, a Mistral; `rounded`, what 4 bits hold of it; `save` of a run with three answers; `peft`, made of that."""
    folder = tmp_path_factory.mktemp("tuned")
    train_sentencepiece(tiny_dense(folder / "hf", "mistral", **SIZES) / "tokenizer.model")
    nf4_rounded(folder / "hf", folder / "rounded")
    raw = [{"messages": [{"role": "user", "content": f"{QUESTION} {number}"},
                         {"role": "assistant", "content": f"It is {number}."}]} for number in (1, 2, 3)]
    (folder / "raw.json").write_text(json.dumps(raw))
    recipe = next(name for name in book.recipes() if name.startswith("tiny_qlora_openai_json"))
    outcome = pretrain(1, [recipe, "--hf-checkpoint", str(folder / "hf"), "--input", str(folder / "raw.json"), "--save",
                           str(folder / "save"), "--seq-length", "64", "--train-epochs", "8", "--prompt-type", TEMPLATE,
                           "--evaluation-questions", QUESTION, "--export-hf-interval", "500"],
                       folder / "run", command="finetune")
    assert outcome.codes == [0], outcome.logs[0][-3000:]
    last = max(outcome.steps)
    assert "mistral of" in outcome.logs[0] and outcome.losses(last)[0] < outcome.losses(1)[0] - 1
    assert commands.run("convert", ["--loader", "mixtral_mg", "--load-dir", str(folder / "save"), "--save-model-type",
                                    "peft", "--save-dir", str(folder / "peft"), "--verify"]) == 0
    return folder


@pytest.fixture(scope="module")
def answers(place: Path) -> dict[bool, tuple[list[int], list[int], torch.Tensor]]:
    """With adapters, and without: the question's ids, the tokens of the answer, their log-probabilities' rows."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    prompts = chat_prompts(load_tokenizer("HuggingFaceTokenizer", place / "hf"), place / "hf", TEMPLATE)
    ids, found = prompts.prompt([{"role": "user", "content": QUESTION}]), {}
    model = AutoModelForCausalLM.from_pretrained(place / "rounded", dtype=torch.float32).eval()
    found[False] = (ids, *greedy(model, ids, NEW))
    found[True] = (ids, *greedy(PeftModel.from_pretrained(model, place / "peft").eval(), ids, NEW))
    assert found[True][1] != found[False][1]
    return found


def test_peft_finds_the_models_own_names(place: Path) -> None:
    said = json.loads((place / "peft" / "adapter_config.json").read_text())
    assert {"gate_proj", "up_proj", "down_proj"} < set(said["target_modules"]) and said["r"] == 64
    names = tensors_of(place / "peft")
    assert len(names) == 2 * 7 * 2 and "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight" in names
    assert all(bool(one.any()) for one in names.values())


def generated(rank: int, model: str, adapter: str, ids: list[int]) -> list[tuple[list[int], list[float]]]:
    from megatron_mixtral.config import ParallelLayout
    from megatron_mixtral.inference import Generator, SamplingParams

    generator = Generator.from_pretrained(model, ParallelLayout(tp=2), adapter=adapter)
    params = [SamplingParams(max_tokens=NEW, ignore_eos=True, logprobs=1, adapter=on) for on in (True, False)]
    return [(list(one.token_ids), [token.logprob for token in one.logprobs])
            for one in generator.generate([ids, ids], params)]


@pytest.mark.parametrize("form", ["save", "peft"])
def test_the_generator_says_what_peft_says(form: str, place: Path, answers: dict[bool, Any]) -> None:
    ids = answers[True][0]
    for found in run_ranks(2, generated, str(place / "hf"), str(place / form), ids):
        for (tokens, logprobs), (_, expected, rows) in zip(found, (answers[True], answers[False]), strict=True):
            assert tokens == expected
            assert logprobs == pytest.approx([float(row[one]) for row, one in zip(rows, expected, strict=True)],
                                             abs=1e-4)


def test_server_and_chat_say_it_too(place: Path, answers: dict[bool, Any]) -> None:
    tokenizer = load_tokenizer("HuggingFaceTokenizer", place / "hf")
    common = ["--load", str(place / "hf"), "--adapter", str(place / "save"), "--prompt-template", TEMPLATE]
    served = Served(1, [*common, "--served-adapter-name", "tuned"], place)
    try:
        client = served.client()
        assert [one.id for one in client.models.list()] == ["hf", "tuned"]
        said = {name: client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": QUESTION}], max_tokens=NEW,
            temperature=0).choices[0].message.content for name in ("hf", "tuned")}
    finally:
        served.kill()
    for name, on in (("hf", False), ("tuned", True)):
        tokens = answers[on][1]
        whole = tokenizer.decode(tokens[:tokens.index(tokenizer.eos_id)] if tokenizer.eos_id in tokens else tokens)
        assert said[name] == whole.rstrip("\ufffd"), "which is the beginning of a character"
    assert said["tuned"].startswith("It is ")
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, str(ROOT / "tools/chat_mixtral.py"), *common, "--max-tokens", str(NEW)],
                          input=f"{QUESTION}\n/adapter off\n/clear\n{QUESTION}\n/quit\n", text=True,
                          capture_output=True, timeout=HANG, env=kept | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert said["tuned"] in done.stdout and said["hf"] in done.stdout


def test_merged_it_is_a_mistral_that_says_it(place: Path, answers: dict[bool, Any]) -> None:
    from transformers import AutoModelForCausalLM

    assert commands.run("merge-lora", ["--load-dir", str(place / "hf"), "--adapter", str(place / "save"), "--save-dir",
                                       str(place / "merged"), "--into", "rounded", "--verify"]) == 0
    assert (place / "merged/config.json").read_bytes() == (place / "hf/config.json").read_bytes()
    ids, tokens, rows = answers[True]
    found = greedy(AutoModelForCausalLM.from_pretrained(place / "merged", dtype=torch.float32).eval(), ids, NEW)
    assert found[0] == tokens and (found[1] - rows).abs().max() < 1e-4
