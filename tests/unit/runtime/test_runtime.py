"""The machine: detection, repairs the engine still needs, an honest CPU stand-in, the optimizer's arithmetic."""

import copy
import importlib
import os
import queue
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.ranks import run_ranks

from megatron_mixtral.errors import ConfigError
from megatron_mixtral.runtime import backend
from megatron_mixtral.runtime.cpu import stand_ins as cpu
from megatron_mixtral.runtime.engine_fixes import adam
from megatron_mixtral.runtime.replacements import Replacements

# -- detection -------------------------------------------------------------------------------------------


def test_no_gpu_gives_gloo_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = backend.detect()
    assert (found.device, found.collectives, found.transformer_impl) == ("cpu", "gloo", "local")
    assert torch.__version__ in found.reason
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES='' hides the GPUs" in backend.detect().reason


def test_gpu_is_used_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    assert backend.detect(2).collectives == "nccl"
    with pytest.raises(ConfigError, match=r"4 processes on this node but 2 visible GPU\(s\).*--nproc-per-node"):
        backend.detect(4)


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA H200", 989.4), ("NVIDIA H20", 148.0),
    ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA GB200", 2500.0), ("NVIDIA GeForce GTX 1080", None),
])
def test_the_peak_of_usual_gpus_is_known(name: str, peak: float | None) -> None:
    assert backend.peak_tflops(name) == peak


def test_memory_of_this_process_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = backend.memory_used()
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert backend.memory_used() - before > 32 * 2**20 and len(held)
    assert backend.peak_tflops() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    assert backend.memory_used() == 7


def test_stand_in_refuses_to_hide_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    replacements = Replacements()
    with pytest.raises(ConfigError, match="would hide a visible GPU"):
        cpu.enable(replacements)
    assert len(replacements) == 0


def test_replacements_are_undone() -> None:
    class Base:
        name = "base"

    class Derived(Base):
        pass

    replacements = Replacements()
    replacements.set(Derived, "name", "new")
    assert Derived.name == "new" and Base.name == "base"
    replacements.undo()
    assert Derived.name == "base" and "name" not in vars(Derived)
    with pytest.raises(AssertionError, match="no attribute"):
        replacements.set(Derived, "gone", 1)


def test_importing_the_library_changes_nothing() -> None:
    import megatron_mixtral.runtime  # noqa: F401

    assert torch.cuda.current_device.__module__ == "torch.cuda"


# -- engine repairs --------------------------------------------------------------------------------------


def _still_needed(rank: int) -> dict[str, bool]:
    """Ask each repair about the untouched engine."""
    from megatron_mixtral.runtime import environment
    from megatron_mixtral.runtime.engine_fixes import fixes as engine_fixes

    environment.undo()
    try:
        return {fix.name: fix.needed() for fix in (*engine_fixes.FIXES, *engine_fixes.TRAINING_FIXES)}
    finally:
        environment.ready(training=True)


def test_each_engine_repair_is_still_needed() -> None:
    [needed] = run_ranks(1, _still_needed)
    obsolete = [name for name, still in needed.items() if not still]
    assert not obsolete, f"the engine no longer needs {obsolete}: delete them from runtime/engine_fixes/fixes.py"


def test_each_repair_says_what_and_until_when() -> None:
    from megatron_mixtral.runtime.engine_fixes import fixes as engine_fixes

    for fix in (*engine_fixes.FIXES, *engine_fixes.TRAINING_FIXES):
        assert all((fix.symptom, fix.cause, fix.versions, fix.remove_when))


# -- restarts ----------------------------------------------------------------------------------------------


def test_a_restarted_rank_reads_nothing_of_the_last_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import TCPStore

    from megatron_mixtral.runtime import store_of_this_start

    for name in ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    assert store_of_this_start() is None
    agents = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agents.set("address of rank 1", "gone")
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agents.port), "WORLD_SIZE": "1",
                   "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    store = store_of_this_start()
    assert not store.check(["address of rank 1"])
    store.set("address of rank 1", "here")
    assert store.get("address of rank 1") == b"here" and agents.get("address of rank 1") == b"gone"


def test_torch_still_keeps_one_store_over_restarts() -> None:
    rendezvous = importlib.import_module("torch.distributed.rendezvous")  # `torch.distributed` has a function so named
    assert "RESTART_COUNT" not in Path(rendezvous.__file__).read_text(), "remove runtime/restarts.py"


# -- the CPU stand-in ------------------------------------------------------------------------------------


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


# -- the optimizer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_is_torchs(decoupled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((5, 3), (7,))]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    mine = adam.FusedAdam(ours, adam_w_mode=decoupled, **settings)
    torchs = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, fused=True, **settings)
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mine.step()
        torchs.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert set(mine.state[a]) == {"exp_avg", "exp_avg_sq"}
    assert mine.param_groups[0]["step"] == 20


def test_adam_state_survives_a_round_trip() -> None:
    parameter = torch.ones(3, requires_grad=True)
    first = adam.FusedAdam([parameter], lr=0.1)
    parameter.grad = torch.ones(3)
    first.step()
    loaded = parameter.detach().clone().requires_grad_()
    second = adam.FusedAdam([loaded], lr=0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # as through a file
    for optimizer, p in ((first, parameter), (second, loaded)):
        p.grad = torch.full((3,), 0.5)
        optimizer.step()
    assert torch.equal(parameter, loaded) and second.param_groups[0]["step"] == 2


def test_adam_skips_parameters_without_gradient() -> None:
    used, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = adam.FusedAdam([used, unused], lr=0.1)
    used.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(unused.detach(), torch.ones(2)) and not torch.equal(used.detach(), torch.ones(2))


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
