"""The extension of the native engine for tests, built from the sources as they are, with any flags of the compiler."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_mixtral.data.engines import native
from megatron_mixtral.data.engines.base import EngineUnavailable

MODULE = "megatron_mixtral.data.engines._native_bpe"


def ensure_extension(folder: Path) -> None:
    """Use the extension that is installed, if it is of these sources; else build one in `folder`, for this process."""
    try:
        native.load_extension()
    except EngineUnavailable:
        use_extension(compile_extension(folder))
    native.load_extension()


def compile_extension(folder: Path, *flags: str) -> Path:
    """Compile with setup.py's macros. Skips the test that asks on a machine without a C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        pytest.skip("the native engine needs a C++ compiler, and there is none on PATH")
    target = folder / "_native_bpe.abi3.so"
    subprocess.run(
        [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", *flags,
         "-DPy_LIMITED_API=0x030C0000", f'-DNATIVE_BPE_SOURCES="{native.fingerprint(native.SOURCES)}"',
         f"-I{sysconfig.get_path('include')}", *sorted(map(str, native.SOURCES.glob("*.cpp"))), "-o", str(target)],
        check=True,
    )  # fmt: skip
    return target


def use_extension(path: Path) -> None:
    """Make this file the extension that the engine imports."""
    spec = importlib.util.spec_from_file_location(MODULE, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[MODULE] = module
    parent = sys.modules[MODULE.rpartition(".")[0]]
    parent._native_bpe = module
