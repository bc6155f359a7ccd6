"""tools/checkpoint/upcycle.py and select_experts.py as users type them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import TINY, random_hf_directory, randomize, tensors_of

from megatron_mixtral import __main__ as commands
from megatron_mixtral.config import MixtralConfig
from megatron_mixtral.weights.inspection import inspect

ROOT = Path(__file__).resolve().parents[2]


def type_in(folder: Path, command: str) -> subprocess.CompletedProcess:
    """Run a command in a folder that has the clone's `tools`."""
    (folder / "tools").symlink_to(ROOT / "tools")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True,
                          check=False)


def test_upcycle_as_documented(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {key: value for key, value in TINY.items() if "experts" not in key}
    model = MistralForCausalLM(MistralConfig(**sizes)).to(torch.bfloat16)
    randomize(model, 0)
    model.save_pretrained(tmp_path / "model_from_hf" / "Mistral-7B")
    (tmp_path / "model_from_hf" / "Mistral-7B" / "tokenizer.json").write_text("{}")
    done = type_in(tmp_path, """python tools/checkpoint/upcycle.py --load-dir ./model_from_hf/Mistral-7B/ \\
    --save-dir ./model_from_hf/Mixtral-8x7B-upcycled/ --num-experts 8 --moe-router-topk 2 --seed 1234""")
    assert done.returncode == 0, done.stderr
    target = tmp_path / "model_from_hf" / "Mixtral-8x7B-upcycled"
    found = inspect(target, deep=True)
    assert found.problem is None and found.architecture["num_local_experts"] == 8
    assert (target / "tokenizer.json").exists() and "tensors" in done.stdout


def test_select_experts_as_documented(tmp_path):
    hf = random_hf_directory(tmp_path / "model_from_hf" / "Mixtral-8x7B",
                             MixtralConfig(**TINY | {"num_local_experts": 8}), torch.bfloat16)
    done = type_in(tmp_path, """python tools/checkpoint/select_experts.py --load-dir ./model_from_hf/Mixtral-8x7B/ \\
    --save-dir ./model_from_hf/Mixtral-4x7B/ --experts 0 2 5 7""")
    assert done.returncode == 0, done.stderr
    target = tmp_path / "model_from_hf" / "Mixtral-4x7B"
    assert MixtralConfig.from_hf_dir(target).num_local_experts == 4
    old, new = tensors_of(hf), tensors_of(target)
    gate = "model.layers.3.block_sparse_moe.gate.weight"
    assert torch.equal(new[gate], old[gate][[0, 2, 5, 7]])


def test_the_busiest_experts_of_a_run(tmp_path):
    hf = random_hf_directory(tmp_path / "hf", MixtralConfig(**TINY))
    (tmp_path / "loads.jsonl").write_text(2 * (json.dumps({"expert_load": [[1, 9, 3, 7]] * 4}) + "\n"))
    assert commands.run("select-experts", ["--load-dir", str(hf), "--save-dir", str(tmp_path / "out"), "--router-load",
                                      str(tmp_path / "loads.jsonl"), "--keep", "2", "--verify"]) == 0
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    assert torch.equal(tensors_of(tmp_path / "out")[gate], tensors_of(hf)[gate][[1, 3]])


def test_refusals_are_one_sentence(tmp_path, capsys):
    hf = random_hf_directory(tmp_path / "hf", MixtralConfig(**TINY))
    (tmp_path / "load.json").write_text("[[1, 2, 3, 4]]")
    paths = ["--load-dir", str(hf), "--save-dir", str(tmp_path / "out")]
    for name, more, sentence in (
        ("select-experts", ["--experts", "0", "9"], "0 to 3"),
        ("select-experts", ["--experts", "0"], "num_experts_per_tok 2 exceeds"),
        ("select-experts", ["--router-load", str(tmp_path / "load.json")], "the model has 4 experts in 4 layers"),
        ("select-experts", ["--router-load", str(tmp_path / "absent.json")], "absent.json"),
        ("upcycle", [], "model_type is 'mixtral'"),
    ):
        assert commands.run(name, [*paths, *more]) == 1
        said = capsys.readouterr().err
        assert sentence in said and said.startswith("error: ") and said.count("\n") == 1
    with pytest.raises(SystemExit):
        commands.run("select-experts", paths)
    assert not (tmp_path / "out").exists()
