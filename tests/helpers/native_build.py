"""Our extension for tests, built from the sources as they are, with any flags of the compiler."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_mixtral.tokenizer.engines import native

SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TESTS = Path(__file__).resolve().parents[1]


def ensure_extension(folder: Path) -> None:
    """Use the extension that is installed, if it is of these sources; else build one in `folder`, for this process."""
    try:
        native.load_module()
    except native.EngineUnavailable:
        use_extension(compile_extension(folder))
    native.load_module()


def compile_extension(folder: Path, *flags: str) -> Path:
    """Compile with setup.py's macros. Skips the test that asks on a machine without a C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        pytest.skip("our extension needs a C++ compiler, and there is none on PATH")
    target = folder / "_native_bpe.abi3.so"
    subprocess.run(
        [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", *flags,
         "-DPy_LIMITED_API=0x030C0000", f'-DNATIVE_SOURCES="{native.fingerprint()}"',
         f"-I{sysconfig.get_path('include')}", *sorted(map(str, native.SOURCES.glob("*.cpp"))), "-o", str(target)],
        check=True,
    )  # fmt: skip
    return target


def use_extension(path: Path) -> None:
    """Make this file our extension."""
    spec = importlib.util.spec_from_file_location(native.MODULE, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    sys.modules[native.MODULE] = loaded
    package, _, name = native.MODULE.rpartition(".")
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
