"""`generate` as it is typed: it starts its ranks, reads prompts from standard input, and says what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from helpers.models import tiny_hf_mixtral

from megatron_mixtral.weights import convert, open_sink, open_source

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, *argv: str, stdin: str = "") -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("RANK", "WORLD_SIZE", "PYTHONWARNINGS")}
    return subprocess.run([sys.executable, str(ROOT / "tools" / "generate_mixtral.py"), *argv], cwd=folder, input=stdin,
                          env=environment | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}, text=True,
                          capture_output=True, timeout=600)


def test_prompts_from_standard_input_in_another_layout_than_the_checkpoints(tmp_path: Path) -> None:
    from transformers import MixtralForCausalLM

    convert(open_source(tiny_hf_mixtral(tmp_path / "hf")), open_sink(tmp_path / "dist", "torch_dist"))
    model = MixtralForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    prompts = [[5, 9, 13], [7] * 20]
    done = run(tmp_path, "--load", "dist", "--tensor-model-parallel-size", "2", "--max-tokens", "8", "--ignore-eos",
               "--jsonl", stdin="".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "starting 2 ranks on this machine" in done.stderr
    assert done.stderr.count("of cache: 8 slots x 64 tokens in float32") == 1  # rank 0 says it for all
    said = [line.split()[0] for line in done.stderr.splitlines()]
    assert said == ["starting", "running", "each", "loaded"], done.stderr  # nothing of torch's or the engine's
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["prompt"] for answer in answers] == prompts
    for answer, prompt in zip(answers, prompts, strict=True):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0,
                             eos_token_id=None)
        assert answer["token_ids"] == out[0, len(prompt):].tolist()


def test_what_is_wrong_is_one_sentence_before_any_rank_is_started(tmp_path: Path) -> None:
    done = run(tmp_path, "--load", "hf", "--prompts-file", "nowhere.txt", "--tensor-model-parallel-size", "2")
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith(
        "error: the prompts of nowhere.txt cannot be read: ") and done.stderr.count("\n") == 1
