#!/usr/bin/env python3
"""What this machine and its Python are, as far as a training run depends on it: lines for a reader, JSON for a table.

    python benchmarks/gpu/environment.py --json environment.json
"""

# ruff: noqa: T201
import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import _clone  # noqa: F401 - makes the imports below work
import torch  # noqa: E402

from megatron_mixtral.errors import MixtralError  # noqa: E402

PACKAGES = ("torch", "triton", "megatron-core", "transformers", "transformer-engine", "flash-attn", "numpy")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_HOME", "CC", "NCCL_DEBUG")


def said(*command: str) -> str | None:
    """What a program prints, None where there is no such program."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout or done.stderr).strip()


def package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def of_torch() -> dict[str, Any]:
    found: dict[str, Any] = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
                             "architectures": torch.cuda.get_arch_list(), "available": torch.cuda.is_available()}
    if found["available"]:
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["gpus"] = [{"name": one.name, "capability": f"{one.major}.{one.minor}", "memory": one.total_memory,
                          "multiprocessors": one.multi_processor_count}
                         for one in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))]
    return found


def of_library() -> dict[str, Any]:
    """What the library makes of the machine; its sentence where it refuses."""
    from megatron_mixtral import runtime
    from megatron_mixtral.runtime import gpu

    try:
        backend = runtime.ready()
        found = {"device": backend.device, "layers": backend.transformer_impl, "reason": backend.reason}
        if backend.device == "cuda":
            found |= {"groups_are_fast": gpu.groups_are_fast(torch.bfloat16), "peak_tflops": runtime.peak_tflops()}
        backend.check_compiler()
        backend.check_checkpoints()
    except MixtralError as refusal:
        return {"refused": str(refusal)}
    return found


def report() -> dict[str, Any]:
    return {
        "python": sys.version.split()[0], "system": platform.platform(), "processors": os.cpu_count(),
        "packages": {name: package(name) for name in PACKAGES},
        "apex": importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "torch": of_torch(), "library": of_library(), "compiler": said(os.environ.get("CC", "gcc"), "--version"),
        "driver": said("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit",
                       "--format=csv,noheader"),
        "topology": said("nvidia-smi", "topo", "-m"),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    found = report()
    for name, value in found.items():
        print(f"{name}: {json.dumps(value) if isinstance(value, dict) else value}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return 1 if "refused" in found["library"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
