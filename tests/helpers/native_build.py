"""Our extensions for tests, built from the sources as they are, with any flags of the compiler."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_mixtral.tokenizer.engines.extensions import ExtensionMissing, fingerprint, load_extension, sources_of

BPE = "megatron_mixtral.tokenizer.engines._native_bpe"
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TESTS = Path(__file__).resolve().parents[1]


def ensure_extension(module: str, folder: Path) -> None:
    """Use the extension that is installed, if it is of these sources; else build one in `folder`, for this process."""
    try:
        load_extension(module)
    except ExtensionMissing:
        use_extension(module, compile_extension(module, folder))
    load_extension(module)


def compile_extension(module: str, folder: Path, *flags: str) -> Path:
    """Compile with setup.py's macros. Skips the test that asks on a machine without a C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        pytest.skip("our extensions need a C++ compiler, and there is none on PATH")
    sources = sources_of(module)
    target = folder / f"{module.rpartition('.')[2]}.abi3.so"
    subprocess.run(
        [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", *flags,
         "-DPy_LIMITED_API=0x030C0000", f'-DNATIVE_SOURCES="{fingerprint(sources)}"',
         f"-I{sysconfig.get_path('include')}", *sorted(map(str, sources.glob("*.cpp"))), "-o", str(target)],
        check=True,
    )  # fmt: skip
    return target


def use_extension(module: str, path: Path) -> None:
    """Make this file the extension of that name."""
    spec = importlib.util.spec_from_file_location(module, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    sys.modules[module] = loaded
    package, _, name = module.rpartition(".")
    setattr(importlib.import_module(package), name, loaded)


def run_sanitized(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a Python file with the runtime of the address sanitizer in front of everything else.

    Python itself never frees some memory at its end, so leaks are not looked for. Its own allocator would hide what is
    written behind the end of a small buffer, so that of the system is used.
    """
    runtime = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environ = dict(
        os.environ,
        LD_PRELOAD=runtime.stdout.strip(),
        ASAN_OPTIONS="detect_leaks=0",
        PYTHONMALLOC="malloc",
        PYTHONPATH=os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    )
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=900)
