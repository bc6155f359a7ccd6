"""`from_pretrained`: a ready model from each kind of directory, in one plain process, under torchrun, on many ranks.

Judge is `transformers`, in this process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import engine
from helpers.models import tiny_hf_mixtral
from helpers.ranks import ROOT, run_ranks

from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.weights import convert, open_sink, open_source

KINDS = ["hf", "ranks", "dist"]
PROGRAM = """
import json, sys
import torch
from megatron_mixtral.config import MixtralConfig, ParallelLayout
from megatron_mixtral.errors import MixtralError

def sentence(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except MixtralError as error:
        return type(error).__name__ + ": " + str(error)
    return "no error"

folder, out, tp = sys.argv[1], sys.argv[2], int(sys.argv[3])
import megatron_mixtral.model as model
from megatron_mixtral.model import build, from_pretrained, transformer_config

config = MixtralConfig.from_hf_dir(folder + "/hf")
said = {"build": sentence(lambda: build(config, transformer_config(config, ParallelLayout()), max_sequence_length=64,
                                        padded_vocab_size=96))}
for name, args in {"directory": [folder + "/nowhere"], "empty": [folder], "layout": ["hf", ParallelLayout(tp=3)],
                   "world": ["hf", ParallelLayout(pp=4)], "vpp": ["hf", ParallelLayout(pp=2, vpp=2)],
                   "dtype": ["hf", ParallelLayout(), "int8"]}.items():
    said[name] = sentence(from_pretrained, folder + "/hf" if args[0] == "hf" else args[0], *args[1:])
ids, found, types = torch.load(out + "/ids.pt"), {}, {}
for kind in ("hf", "ranks", "dist"):
    ready = from_pretrained(folder + "/" + kind, ParallelLayout(tp=tp))
    with torch.no_grad():
        found[kind] = ready(ids, torch.arange(ids.shape[1])[None], None)
    types[kind] = str(from_pretrained(folder + "/" + kind, ParallelLayout(tp=tp), torch.bfloat16).decoder.layers[0]
                      .self_attention.linear_proj.weight.dtype)
said["other"] = sentence(from_pretrained, folder + "/hf", ParallelLayout(ep=2) if tp == 2 else ParallelLayout(tp=2))
rank = torch.distributed.get_rank()
torch.save({"logits": found, "said": said, "types": types, "training": ready.training}, f"{out}/rank{rank}.pt")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a Hugging Face directory, rank directories of a layout, and a distributed checkpoint."""
    found = tmp_path_factory.mktemp("pretrained")
    source = open_source(tiny_hf_mixtral(found / "hf", vocab_size=97))  # odd: two tensor-parallel ranks pad it
    convert(source, open_sink(found / "ranks", "torch", ParallelLayout(tp=2, pp=2, ep=2, etp=1)))
    convert(source, open_sink(found / "dist", "torch_dist"))
    return found


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(ids).logits


def run_program(folder: Path, out: Path, ids: torch.Tensor, processes: int) -> list[dict]:
    """The program above, started plainly or by torchrun; what each rank found."""
    torch.save(ids, out / "ids.pt")
    (out / "program.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    start = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([*start, str(out / "program.py"), str(folder), str(out), str(processes)],
                          env=environment | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
    return [torch.load(out / f"rank{rank}.pt") for rank in range(processes)]


def test_one_plain_process(folder, ids, expected, tmp_path) -> None:
    [found] = run_program(folder, tmp_path, ids, 1)
    for kind in KINDS:
        assert (found["logits"][kind] - expected).abs().max() < 1e-5, kind
    assert set(found["types"].values()) == {"torch.bfloat16"} and found["training"] is False
    said = found["said"]
    assert said["build"].startswith("ConfigError: the engine has no process groups yet: call megatron_mixtral.model.")
    assert said["directory"] == f"CheckpointError: {folder}/nowhere does not exist or is not a directory"
    assert "is not a Megatron checkpoint" in said["empty"]
    assert "2 is not divisible by tp 3" in said["layout"] and "set ParallelLayout(tp=...) to one of" in said["layout"]
    assert said["world"].startswith("ConfigError: world size 1 is not a multiple of tp x pp x cp = 4")
    assert "torchrun --nproc-per-node" in said["world"]
    assert "leave vpp out" in said["vpp"] and "dtype is int8, a model computes in float32" in said["dtype"]
    assert "tp2" in said["other"] and "ConfigError: world size 1" in said["other"]


def test_torchrun(folder, ids, expected, tmp_path) -> None:
    first, second = run_program(folder, tmp_path, ids, 2)
    for kind in KINDS:
        logits = torch.cat([first["logits"][kind], second["logits"][kind]], dim=-1)
        assert logits.shape[-1] == 98 and (logits[..., :97] - expected).abs().max() < 1e-5, kind
    assert "has process groups of layout tp2-pp1-ep1, asked for is tp1-pp1-ep2" in first["said"]["other"]


def _logits(rank: int, directory: str, layout: dict[str, int], rows: torch.Tensor) -> torch.Tensor | None:
    from megatron_mixtral.model import from_pretrained

    return engine.logits_of([from_pretrained(directory, ParallelLayout(**layout))], rows)


@pytest.mark.parametrize(("kind", "world", "layout"), [
    ("hf", 8, {"tp": 2, "pp": 2, "ep": 2}),
    ("hf", 4, {"tp": 2, "pp": 2, "ep": 2, "etp": 1}),
    ("ranks", 4, {"pp": 2, "ep": 2}),
    ("ranks", 2, {"pp": 2, "first": 1, "last": 3}),
    ("dist", 4, {"tp": 2, "ep": 4, "etp": 1}),
])
def test_many_ranks(kind, world, layout, folder, ids, expected) -> None:
    rows = torch.cat([ids, ids[:, :1]], dim=1)  # the engine's batches have a label behind the last token
    found = [logits for logits in run_ranks(world, _logits, str(folder / kind), layout, rows) if logits is not None]
    whole = torch.cat(found)[..., :97]
    assert whole.shape == expected.shape and (whole - expected).abs().max() < 1e-5
