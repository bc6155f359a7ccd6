"""The extension of megatron-mixtral. Everything else about the package is in pyproject.toml."""

import zlib
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent


def native_extension(name: str) -> Extension:
    """A module of preprocessing in C++. Optional: without a compiler the installation goes on without it."""
    *packages, module = name.split(".")
    folder = Path(*packages, module.removeprefix("_"))
    files = sorted(path for path in (ROOT / folder).iterdir() if path.suffix in (".cpp", ".h"))
    checksum = zlib.crc32(b"".join(path.read_bytes() for path in files))  # as `fingerprint` in native.py
    return Extension(
        name,
        sources=[str(folder / path.name) for path in files if path.suffix == ".cpp"],
        depends=[str(folder / path.name) for path in files],
        define_macros=[("NATIVE_SOURCES", f'"{checksum:08x}"'), ("Py_LIMITED_API", "0x030C0000")],
        extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden"],
        py_limited_api=True,
        language="c++",
        optional=True,
    )


setup(
    ext_modules=[
        native_extension("megatron_mixtral.tokenizer.engines._native_bpe"),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp312"}},  # one wheel for all later releases of Python
)
