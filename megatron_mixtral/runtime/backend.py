"""`Backend`: which machine this is, and why we think so."""

import importlib
import os
from dataclasses import dataclass

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

    def waits(self) -> Waits:
        """A counter of the seconds that this process waits in collectives; one for each process."""
        return Waits(self.device == "cuda").install()


def detect(world_size: int | None = None) -> Backend:
    """Look at the machine; changes nothing.

    A visible GPU is always used. To run on the CPU of a machine with GPUs, hide them: `CUDA_VISIBLE_DEVICES=`.
    `world_size`, the number of local processes, is checked against the number of GPUs: `ConfigError`.
    """
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if world_size is not None and world_size > count:
            raise ConfigError(f"{world_size} processes on this node but {count} visible GPU(s): start at most {count} "
                              "(--nproc-per-node), or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU")
        name = torch.cuda.get_device_name(0)
        return Backend("cuda", "nccl", _importable("transformer_engine.pytorch"),
                       f"torch {torch.__version__} sees {count} GPU(s), the first a {name}")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        why = f"CUDA_VISIBLE_DEVICES={hidden!r} hides the GPUs"
    elif torch.version.cuda is None:
        why = f"torch {torch.__version__} is built without CUDA"
    else:
        why = f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU"
    return Backend("cpu", "gloo", False, why)


def current_device() -> torch.device:
    """The device of this rank; call `ready()` before."""
    return torch.device(torch.cuda.current_device())


def device_memory() -> int:
    """Bytes that each local process may use: its GPU's memory, or its share of what the machine has free now."""
    if torch.cuda.is_available():
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
