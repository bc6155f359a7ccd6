"""The machine: detection, replacements, and the process group of a start."""

import importlib
import mmap
from pathlib import Path

import pytest
import torch

from megatron_mixtral.errors import ConfigError
from megatron_mixtral.runtime import backend
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
    with mmap.mmap(-1, 64 * 2**20) as held:  # pages of its own: a tensor may be given ones that were freed before
        held.write(b"x" * len(held))
        assert backend.memory_used() - before > 32 * 2**20
    assert backend.peak_tflops() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    assert backend.memory_used() == 7


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
    assert "RESTART_COUNT" not in Path(rendezvous.__file__).read_text(), "remove store_of_this_start"
