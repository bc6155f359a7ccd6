"""The wheel, installed into an environment of its own and used in an empty folder, as after `pip install`.

The environment finds the packages that the wheel depends on in the tests' own, so nothing is fetched. Of these,
transformers and safetensors are of an extra and must not be needed: importing them fails there.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from helpers.corpus import python_sources, write_jsonl
from helpers.models import random_hf_directory

from examples.quickstart.hf_tokenizer import write_hf_tokenizer
from megatron_mixtral import __version__
from megatron_mixtral.__main__ import COMMANDS
from megatron_mixtral.config import preset

ROOT = Path(__file__).resolve().parents[2]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, by the setuptools of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    shutil.copytree(ROOT / "megatron_mixtral", tree / "megatron_mixtral",
                    ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    done = subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The `bin` of an environment that has the wheel and sees the tests' packages, without those of an extra."""
    venv = wheel.parent / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    subprocess.run([str(venv / "bin" / "pip"), "install", "--quiet", "--no-deps", "--no-index",
                    "--disable-pip-version-check", str(wheel)], check=True)  # fmt: skip
    (packages,) = (venv / "lib").glob("python*/site-packages")
    (packages / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for extra in ("transformers", "safetensors"):
        (packages / f"{extra}.py").write_text(f"raise ModuleNotFoundError('{extra} is not in this environment')\n")
    return venv / "bin"


def run(installed: Path, folder: Path, *words: object, status: int = 0) -> str:
    """Run a command of the environment in `folder`; returns what it printed, on either stream."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(installed / "megatron-mixtral"), *map(str, words)], cwd=folder, env=kept, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert done.returncode == status, done.stdout
    return done.stdout


def test_what_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert {name.split("/")[0] for name in names} == {"megatron_mixtral", f"megatron_mixtral-{__version__}.dist-info"}
    assert "megatron_mixtral/py.typed" in names and not [name for name in names if name.endswith((".cpp", ".h"))]
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "megatron_mixtral").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert not [line for line in needed if "transformers" in line or "safetensors" in line]


def test_the_commands_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    listed = run(installed, tmp_path, "--help")
    assert all(f"\n  {name} " in listed for name in COMMANDS)
    assert "mixtral_8x7b_instruct_qlora_oasst1_e3" in run(installed, tmp_path, "recipes", "list")
    assert run(installed, tmp_path, "--version") == f"megatron-mixtral {__version__}\n"

    write_jsonl(tmp_path / "corpus.jsonl", python_sources(20))
    write_hf_tokenizer(tmp_path / "tokenizer")
    run(installed, tmp_path, "preprocess", "--input", "corpus.jsonl", "--output-prefix", "corpus", "--append-eod",
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "tokenizer", "--workers", 2)
    assert json.loads((tmp_path / "reports" / "corpus.report.json").read_text())["keys"]["text"]["documents"] == 20
    assert "whole" in run(installed, tmp_path, "inspect-dataset", "corpus_text_document")

    random_hf_directory(tmp_path / "hf", preset("tiny"))
    run(installed, tmp_path, "convert", "--loader", "mixtral_hf", "--load-dir", "hf", "--save-dir", "megatron",
        "--target-tensor-parallel-size", 2)
    assert "tp2" in run(installed, tmp_path, "inspect", "megatron")
    dry = run(installed, tmp_path, "pretrain", "--hf-checkpoint", "hf", "--dry-run", "--seq-length", 64,
              "--micro-batch-size", 1, "--global-batch-size", 2)
    assert "memory per device" in dry
    refused = run(installed, tmp_path, "convert", "--loader", "mixtral_hf", "--load-dir", "none", "--save-dir", "x",
                  status=1)
    assert refused.startswith("error: ") and "Traceback" not in refused
