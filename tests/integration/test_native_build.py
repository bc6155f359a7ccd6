"""Installation with and without a C++ compiler: both give a working program; only one of them has our extensions."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENCODE = """
import json, logging, sys
import megatron_mixtral
from megatron_mixtral.tokenizer.engines.choose import BARE, choose_engine
from megatron_mixtral.data.corpus.records import line_reader
from megatron_mixtral.tokenizer.tokenizer import mixtral_tokenizer_path, open_tokenizer
logging.basicConfig(format="%(message)s")
choice = choose_engine("auto", open_tokenizer(mixtral_tokenizer_path()), ["some text"])
ids, _ = choice.engine.encode(["some text"], BARE)
print(json.dumps([megatron_mixtral.__file__, choice.engine.name, ids.tolist(), line_reader(("text",)) is not None]))
"""


def build(folder: Path, **environ: str) -> Path:
    """Build a copy of the tree as an installation does; returns the folder with the package."""
    tree = folder / "tree"
    built = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "megatron_mixtral", tree / "megatron_mixtral", ignore=built)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-lib", str(folder / "lib")],
                   cwd=tree, env=os.environ | environ, check=True, timeout=300)  # fmt: skip
    return folder / "lib"


def encode(lib: Path) -> tuple[str, list[int], bool, str]:
    """Engine and ids that the program of this folder has for "some text", whether it has the reader of JSON lines, and
    what it logged.
    """
    done = subprocess.run([sys.executable, "-c", ENCODE], env=os.environ | {"PYTHONPATH": str(lib)}, cwd=lib,
                          capture_output=True, text=True, check=True, timeout=120)  # fmt: skip
    where, engine, ids, reads_lines = json.loads(done.stdout)
    assert Path(where).is_relative_to(lib)
    return engine, ids, reads_lines, done.stderr


def test_without_a_compiler(tmp_path):
    lib = build(tmp_path, CC="/bin/false", CXX="/bin/false")
    engine, ids, reads_lines, log = encode(lib)
    assert engine in ("gigatoken", "sentencepiece") and ids == [741, 2245] and not reads_lines
    assert "tokenizer engine native is not used: its extension is not built" in log


@pytest.mark.slow
def test_with_a_compiler(tmp_path):
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no C++ compiler on PATH")
    lib = build(tmp_path)
    assert encode(lib) == ("native", [741, 2245], True, "")
    assert not list(lib.rglob("*.cpp")) and not list(lib.rglob("*.h"))
