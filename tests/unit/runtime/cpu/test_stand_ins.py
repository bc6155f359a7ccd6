"""The CPU machine: honest stand-ins, each of which the engine still asks for."""

import os
import queue
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.models import tiny_hf_mixtral
from helpers.ranks import run_ranks

from megatron_mixtral.errors import ConfigError
from megatron_mixtral.runtime.cpu import stand_ins as cpu
from megatron_mixtral.runtime.replacements import Replacements


def test_stand_in_refuses_to_hide_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    replacements = Replacements()
    with pytest.raises(ConfigError, match="would hide a visible GPU"):
        cpu.enable(replacements)
    assert replacements._saved == []


@cache
def _engine_source() -> str:
    import megatron.core

    root = Path(megatron.core.__file__).parents[1]
    return "\n".join(path.read_text(errors="ignore") for room in ("core", "training")
                     for path in (root / room).rglob("*.py"))


@pytest.mark.parametrize("name", sorted(cpu.cuda_functions()))
def test_each_cuda_function_is_still_asked_for(name: str) -> None:
    assert re.search(rf"torch\.cuda\.(random\.)?{name}\b", _engine_source()), \
        f"remove {name} from runtime/cpu/stand_ins.py"


@pytest.mark.parametrize("name", cpu.FACTORIES)
def test_each_factory_is_still_called_for_cuda(name: str) -> None:
    call = rf"torch\.{name}\((?:[^()]|\([^()]*\))*(device=(['\"]cuda|torch\.device\(['\"]cuda)|pin_memory=True)"
    assert re.search(call, _engine_source()), f"remove {name} from FACTORIES in runtime/cpu/stand_ins.py"


@pytest.mark.parametrize("text", [
    "assert torch.cuda.is_available(), \"Megatron requires CUDA.\"",  # enable_training: allow_no_cuda
    "'torch.cuda.FloatTensor'",  # Tensor.type
    "device_ids=[torch.cuda.current_device()]",  # gloo: barrier
    "as_numpy=True",  # gloo: all_to_all_single
    "torch.distributed.all_gather(output_tensor_list, input_, group=group)",  # gloo: uneven all_gather
    "torch.distributed.reduce_scatter(output, input_tensor_list, group=group)",  # gloo: uneven reduce_scatter
    "torch.cuda.default_generators[idx]",  # _get_cuda_rng_state, _set_cuda_rng_state
    "def get_write_results_queue(mp_mode: str = 'spawn')",  # forked result queue
])
def test_each_other_stand_in_is_still_needed(text: str) -> None:
    assert text in _engine_source(), "the engine has changed here: look whether runtime/ still needs the stand-in"


def _uneven(rank: int) -> tuple[list[list[float]], list[float]]:
    import torch.distributed as dist

    mine = torch.full((rank + 1, 2), float(rank + 1))
    parts = [torch.empty(1, 2), torch.empty(2, 2)]
    dist.all_gather(parts, mine)
    out = torch.empty(rank + 1)
    dist.reduce_scatter(out, [torch.full((1,), 10.0 + rank), torch.full((2,), 20.0 + rank)])
    return [part[:, 0].tolist() for part in parts], out.tolist()


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo stands in only where no GPU is visible")
def test_uneven_collectives_on_gloo() -> None:
    first, second = run_ranks(2, _uneven)
    assert first == ([[1.0], [2.0, 2.0]], [21.0])
    assert second == ([[1.0], [2.0, 2.0]], [41.0, 41.0])


def test_results_of_a_forked_writer_arrive() -> None:
    results = cpu.ResultQueue()
    results.put({"of": "this process"})
    if (child := os.fork()) == 0:
        results.put(["of", "the other"])
        results._file.write((99).to_bytes(8, "little") + b"cut short")
        os._exit(0)
    os.waitpid(child, 0)
    assert results.get_nowait() == {"of": "this process"}
    assert results.get_nowait() == ["of", "the other"]
    with pytest.raises(queue.Empty):
        results.get_nowait()
    results.put("after it")
    assert results.get_nowait() == "after it"


def test_stream_and_event_stand_ins() -> None:
    stream, first, last = cpu.Stream(), cpu.Event(enable_timing=True), cpu.Event(enable_timing=True)
    first.record(stream)
    last.record(stream)
    assert first.query() and stream.query() and 0.0 <= first.elapsed_time(last) < 1000.0
    assert SimpleNamespace(event=stream.record_event()).event.query()


def _transformers_logits(rank: int, hf: str, ids: torch.Tensor) -> torch.Tensor:
    from transformers import MixtralForCausalLM

    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
    model = MixtralForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(ids).logits


def test_transformers_is_right_after_ready(tmp_path: Path) -> None:
    """The factories are replaced there; here they are not."""
    hf, ids = str(tiny_hf_mixtral(tmp_path / "hf")), torch.randint(96, (2, 16))
    [found] = run_ranks(1, _transformers_logits, hf, ids)
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(found, model(ids).logits)
