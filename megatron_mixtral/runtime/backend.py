"""`Backend`: which machine this is, and why we think so."""

import importlib
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from megatron_mixtral.config import hardware
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.runtime.waits import Waits


@dataclass(frozen=True)
class Backend:
    """The machine as the rest of the library needs to know it."""

    device: str  # "cuda" or "cpu"
    collectives: str  # "nccl" or "gloo"
    transformer_engine: bool  # importable and usable here
    reason: str

    @property
    def transformer_impl(self) -> str:
        """Value of the engine's --transformer-impl."""
        return "transformer_engine" if self.transformer_engine else "local"

    def check_compiler(self) -> None:
        """`ConfigError` where the functions that the engine gives to torch.compile cannot be compiled: on a GPU Triton
        builds its way to the driver in C, with Python's headers, at the first of them.
        """
        if self.device != "cuda":
            return
        missing = []
        if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang")))):
            missing.append("a C compiler (gcc, clang, or the one that CC names)")
        header = Path(sysconfig.get_path("include"), "Python.h")
        if not header.exists():
            missing.append(f"{header} (Debian and Ubuntu have it in python3-dev)")
        if missing:
            raise ConfigError(f"torch.compile needs {' and '.join(missing)}, not found here: install what is missing, "
                              "or go without compiled functions by --disable-jit-fuser, which is slower")

    def check_checkpoints(self) -> None:
        """`ConfigError` with a torch for which the pinned engine writes distributed checkpoints that it cannot read: it
        makes a tensor of every property that torch notes, and torch 2.15 notes strides, which no tensor is made with.
        """
        from torch.distributed.checkpoint.metadata import TensorProperties

        if "strides" in TensorProperties.__dataclass_fields__:
            raise ConfigError(f"torch {torch.__version__}: megatron-core {version('megatron-core')} cannot read the "
                              "distributed checkpoints that it writes there; install torch>=2.11,<2.14, or train "
                              "without --save and --load")

    def waits(self) -> Waits:
        """A counter of the seconds that this process waits in collectives; one for each process."""
        return Waits(self.device == "cuda").install()


def detect(world_size: int | None = None) -> Backend:
    """Look at the machine; changes nothing.

    A visible GPU is always used. To run on the CPU of a machine with GPUs, hide them: `CUDA_VISIBLE_DEVICES=`.
    `ConfigError` for a GPU that torch cannot use, and for fewer GPUs than `world_size`, the local processes.
    """
    if _sees_a_gpu():
        count = torch.cuda.device_count()
        if world_size is not None and world_size > count:
            raise ConfigError(f"{world_size} processes on this node but {count} visible GPU(s): start at most {count} "
                              "(--nproc-per-node), or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU")
        name = torch.cuda.get_device_name(0)
        return Backend("cuda", "nccl", _importable("transformer_engine.pytorch"),
                       f"torch {torch.__version__} sees {count} GPU(s), the first a {name}")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not re.match(r"\s*(\d|GPU-|MIG-)", hidden):
        why = f"CUDA_VISIBLE_DEVICES={hidden!r} hides the GPUs"
    else:
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        if (there := _driver_says()) is not None:
            raise ConfigError(
                f"this machine has a GPU that torch cannot use: nvidia-smi says {there}; torch {torch.__version__} is "
                f"built {built}. CUDA 13 needs a driver 580 or newer, CUDA 12.8 one of 570: renew the driver, or "
                "install a torch that is built for it. CUDA_VISIBLE_DEVICES= (empty) runs on the CPU instead")
        why = f"torch {torch.__version__}, built {built}, sees no GPU"
    return Backend("cpu", "gloo", False, why)


def _sees_a_gpu() -> bool:
    """Whether torch can use a GPU: the first that anybody asks of CUDA, which then reads this variable. The order of
    kernels that it gives is what makes the engine's overlap of communication correct before Blackwell; the engine
    asserts it, also where there is no device.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return torch.cuda.is_available()


def _driver_says() -> str | None:
    """The first GPU and the version of its driver, or that this driver is out of order; None where there is no GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
                           capture_output=True, text=True)
    said = (asked.stdout + asked.stderr).strip().splitlines()
    if asked.returncode and not any("mismatch" in line for line in said):  # of a driver that is half renewed
        return None
    return repr(said[0]) if said else None


def current_device() -> torch.device:
    """The device of this rank; call `ready()` before."""
    return torch.device(torch.cuda.current_device())


def device_memory() -> int:
    """Bytes that each local process may use: its GPU's memory, or its share of what the machine has free now."""
    if _sees_a_gpu():
        return torch.cuda.get_device_properties(0).total_memory
    import psutil

    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def memory_used() -> int:
    """Bytes of this process: the most that its GPU's tensors have taken so far, or its resident memory on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss


def peak_tflops(name: str | None = None) -> float | None:
    """Dense bf16 peak of this process's GPU (or of one of that name) in TFLOP/s, None where it is not known."""
    if name is None:
        if not torch.cuda.is_available():
            return None
        name = torch.cuda.get_device_name()
    device = hardware.find(name)
    return device.tflops if device else None


def _importable(module: str) -> bool:
    """Whether an optional extension loads; one that is installed but broken counts as absent, as for the engine."""
    try:
        importlib.import_module(module)
    except Exception:  # noqa: BLE001 - shared objects of another torch fail with anything
        return False
    return True
