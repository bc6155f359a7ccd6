"""The machine: detection, replacements, and the process group of a start."""

import dataclasses
import importlib
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_mixtral.errors import ConfigError
from megatron_mixtral.runtime import backend
from megatron_mixtral.runtime.replacements import Replacements

# -- detection -------------------------------------------------------------------------------------------


def program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_no_gpu_gives_gloo_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = backend.detect()
    assert (found.device, found.collectives, found.transformer_impl) == ("cpu", "gloo", "local")
    assert torch.__version__ in found.reason and "sees no GPU" in found.reason
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES='' hides the GPUs" in backend.detect().reason


def test_gpu_is_used_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    assert backend.detect(2).collectives == "nccl"
    with pytest.raises(ConfigError, match=r"4 processes on this node but 2 visible GPU\(s\).*--nproc-per-node"):
        backend.detect(4)


@pytest.mark.parametrize(("answer", "status", "sentence"), [
    ("NVIDIA H100 80GB HBM3, 535.54.03", 0, r"cannot use: nvidia-smi says 'NVIDIA H100 80GB HBM3, 535.54.03'; torch .*"
                                            r"driver 580 .*CUDA_VISIBLE_DEVICES= \(empty\)"),
    ("Failed to initialize NVML: Driver/library version mismatch", 18, "says 'Failed to initialize NVML: Driver"),
    ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9, None),
    ("", 0, None),
])
def test_a_gpu_that_torch_cannot_use_is_refused(answer: str, status: int, sentence: str | None, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    program(tmp_path / "nvidia-smi", f'printf "%s" "{answer}"; exit {status}')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if sentence is None:
        assert backend.detect().device == "cpu"
        return
    with pytest.raises(ConfigError, match=sentence):
        backend.detect()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert backend.detect().device == "cpu"


def test_what_compiled_functions_need_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = backend.Backend("cuda", "nccl", False, ""), backend.Backend("cpu", "gloo", False, "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda kind: str(tmp_path))
    cpu.check_compiler()
    with pytest.raises(ConfigError, match=r"a C compiler \(gcc.*\) and .*Python.h .*python3-dev.* --disable-jit-fuser"):
        gpu.check_compiler()
    program(tmp_path / "mycc", "exit 0")
    monkeypatch.setenv("CC", "mycc")
    with pytest.raises(ConfigError, match="torch.compile needs /.*Python.h"):
        gpu.check_compiler()
    (tmp_path / "Python.h").touch()
    gpu.check_compiler()


def test_a_torch_whose_checkpoints_the_engine_cannot_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.15's properties of a tensor, in the words of its source: one field more, with which none is made."""
    from torch.distributed.checkpoint import metadata

    here = backend.Backend("cpu", "gloo", False, "")
    here.check_checkpoints()
    fields = [("strides", tuple[int, ...] | None, dataclasses.field(default=None))]
    monkeypatch.setattr(metadata, "TensorProperties", dataclasses.make_dataclass(
        "TensorProperties", fields, bases=(metadata.TensorProperties,)))
    with pytest.raises(ConfigError, match=r"torch 2[.].*cannot read .*install torch>=2.11,<2.14, or .* without --save"):
        here.check_checkpoints()


@pytest.mark.parametrize("first", [backend.detect, backend.device_memory])
def test_cuda_reads_its_order_of_kernels_when_it_is_first_asked(first: Callable[[], object],
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def is_available() -> bool:
        raise Asked(os.environ["CUDA_DEVICE_MAX_CONNECTIONS"])

    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "0")  # what the test has set is put back
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    with pytest.raises(Asked, match="1"):
        first()


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA GB300", 2500.0), ("NVIDIA B300 SXM6 AC", 2250.0), ("NVIDIA GeForce RTX 4090", 165.2),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 480.0), ("NVIDIA RTX 6000 Ada Generation", 364.2),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8), ("NVIDIA H200 NVL", 835.5),
    ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None), ("NVIDIA GeForce RTX 3090 Ti", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA H800 PCIe", None), ("NVIDIA GH200 480GB", 989.4),
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
    asked = "import megatron_mixtral.runtime, torch; print(torch.cuda.current_device.__module__)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    assert done.stdout == "torch.cuda\n", done.stderr


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
