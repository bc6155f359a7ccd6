"""A QLoRA run of the program itself: what its process holds at most is what the planner says.

With a heap that maps each large block by itself and gives it back at once: what a heap keeps is no need of the run.
"""

import ctypes
import json
import os
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import datasets
from helpers.program import pretrain
from safetensors.torch import save_file

from megatron_mixtral.config import AdapterConfig, MixtralConfig, ParallelLayout
from megatron_mixtral.planning import RunShape, stage_memory
from megatron_mixtral.weights import hf_tensors

MODEL = MixtralConfig(vocab_size=96, hidden_size=512, intermediate_size=1792, num_hidden_layers=4,
                      num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=512)
RANK, SEQUENCE, MICRO = 64, 512, 2
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # <malloc.h> of glibc


def _base(directory: Path) -> Path:
    """The model in bf16, of repeated random numbers."""
    directory.mkdir()
    draw = (0.02 * torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))).bfloat16()
    save_file({name: draw.repeat(-(-prod(one.shape) // len(draw)))[:prod(one.shape)].view(one.shape).clone()
               for name, one in hf_tensors(MODEL).items()}, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(MODEL.to_hf_dict("bfloat16")))
    return directory


class _Watch:
    """Writes, in the rank, what of its memory is no file: before the model is built, and at most once it is filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> None:
        from megatron_mixtral.training.adapters import AdapterRun

        os.environ |= {"MALLOC_MMAP_THRESHOLD_": "262144", "THP_MEM_ALLOC_ENABLE": "0"}  # the heap is the user's
        for what, value in ((_TRIM_THRESHOLD, 1 << 18), (_MMAP_THRESHOLD, 1 << 18), (_MMAP_MAX, 1 << 16)):
            assert ctypes.CDLL(None).mallopt(what, value) == 1
        build, fill, look = AdapterRun.build, AdapterRun.fill, AdapterRun.look

        def built(run: Any, *args: Any, **options: Any) -> Any:
            _load_libraries()
            (self.folder / "before").write_text(str(_status()["RssAnon"]))
            return build(run, *args, **options)

        def filled(*args: Any, **options: Any) -> None:
            fill(*args, **options)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

        def looked(*args: Any) -> None:
            look(*args)
            found = _status()
            (self.folder / "most").write_text(str(found["VmHWM"] - found["RssFile"] - found["RssShmem"]))

        AdapterRun.build, AdapterRun.fill, AdapterRun.look = built, filled, looked


def _load_libraries() -> None:
    """What torch loads when it is first used is no need of the run: a step of something small."""
    small = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(small.parameters())
    heads = small(torch.randn(2, 128, 64)).unsqueeze(1)
    torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True).sum().backward()
    optimizer.step()


def _status() -> dict[str, int]:
    """Bytes, by the names of /proc."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1] == "kB"}


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["full", "none"])
def test_the_peak_of_a_run_is_what_was_planned(recompute: str, tmp_path: Path) -> None:
    prefix = datasets.write_dataset(tmp_path / "corpus_text_document", vocab_size=96)
    more = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    outcome = pretrain(1, [
        "--hf-checkpoint", str(_base(tmp_path / "hf")), "--data-path", prefix, "--split", "1,0,0", "--lora-rank",
        str(RANK), "--qlora", "--seq-length", str(SEQUENCE), "--micro-batch-size", str(MICRO), "--global-batch-size",
        str(2 * MICRO), "--train-iters", "2", "--lr", "1e-4", "--min-lr", "1e-4", "--eval-iters", "0",
        "--use-distributed-optimizer", *(more if recompute == "full" else [])], tmp_path / "run",
        prepare=_Watch(tmp_path))
    assert outcome.codes == [0], outcome.logs[0][-3000:]
    before, most = (int((tmp_path / name).read_text()) for name in ("before", "most"))
    adapter = AdapterConfig.of(MODEL, rank=RANK, quantized=True)
    planned = stage_memory(RunShape(MODEL, ParallelLayout(world=1), SEQUENCE, MICRO, 2 * MICRO, recompute,
                                    weight_bytes=4, adapter=adapter), 0)
    print(recompute, f"measured {(most - before) / 1e6:.0f} MB", f"planned {planned.total / 1e6:.0f} MB", planned)
    assert most - before == pytest.approx(planned.total, rel=0.05), planned
