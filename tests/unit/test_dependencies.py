"""What a room does without, as tests: torch, the engine, the machine. docs/design.md has the table."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.house import PACKAGE, dotted, name_of, read_house, room_of, starts_with, where

ROOT = Path(__file__).resolve().parents[2]
HOUSE = read_house(ROOT, (PACKAGE,))
LIBRARY = HOUSE.below(PACKAGE)


def imported(path: str) -> list[tuple[int, str]]:
    """(line, dotted name) of everything imported, at any depth; `from a import b` counts as a.b."""
    return [(line, f"{module}.{name}" if name else module) for line, module, name in HOUSE.imports(path)]


NOTHING_ELSE = ["torch", "megatron", "transformers", "numpy", "safetensors"]  # the standard library is enough
FORBIDDEN = {  # room -> modules that it does without, also inside of functions
    **dict.fromkeys(("errors", "disk", "config", "planning"), NOTHING_ELSE),
    "weights": ["megatron", "transformers", "safetensors", "torch.distributed"],
    "tokenizer": ["megatron", "transformers", "torch"],
    "data": ["megatron", "transformers", "torch"],
    **dict.fromkeys(("model", "lora", "inference", "evaluation"), ["transformers"]),
}
READS_FOR_A_RUN = f"{PACKAGE}/data/datasets/"  # the part of `data` that the engine's datasets are made of


def test_rooms_do_without():
    wrong = []
    for path in LIBRARY:
        room = room_of(name_of(path))
        banned = [] if path.startswith(READS_FOR_A_RUN) else list(FORBIDDEN.get(room, []))
        if room not in ("runtime", "training"):
            banned.append("megatron.training")
        if room != "runtime":
            banned += ["transformer_engine", "apex", "torch.cuda"]
        wrong += [where(path, line, f"{room} imports {name}") for line, name in imported(path)
                  if starts_with(name, *banned)]
    assert not wrong, wrong


# (file, dotted name) that may. A list that should only become shorter.
MACHINE_EXCEPTIONS = {
    ("__main__.py", "os.environ"),  # RANK, and what has to be set before numpy is imported
    ("data/cli.py", "os.environ"),  # handed to a pure function
    ("training/pretrain.py", "os.environ"),  # handed to a pure function, before torch is imported
    ("training/recipes/cli.py", "os.environ"),  # the same
    ("training/pretrain.py", "torch.cuda.current_device"),  # the engine's name of this rank's device; runtime answers
}
ENGINE_EXCEPTIONS = {
    ("training/metrics/hooks.py", "global_vars._GLOBAL_TENSORBOARD_WRITER"),  # the engine has no setter for its writer
}


def test_only_the_runtime_touches_the_machine():
    """torch.cuda and the environment have one owner. `training` may read the engine's arguments, nothing else does."""
    wrong = []
    for path in LIBRARY:
        room, inside = room_of(name_of(path)), path.removeprefix(f"{PACKAGE}/")
        if room == "runtime":
            continue
        tree = HOUSE.tree(path)
        inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}  # parts of longer chains
        for node in ast.walk(tree):
            name = "" if node in inner else dotted(node)
            if starts_with(name, "torch.cuda", "os.environ", "os.getenv", "os.putenv") \
                    and not any(inside == file and starts_with(name, ok) for file, ok in MACHINE_EXCEPTIONS):
                wrong.append(where(path, node.lineno, name))
            if name.split(".")[-1] == "get_args" and room != "training":
                wrong.append(where(path, node.lineno, name))
    assert not wrong, wrong


def test_only_the_runtime_alters_the_engine():
    """No assignment to an attribute of something imported from megatron, and no setattr on it."""
    wrong = []
    for path in LIBRARY:
        inside = path.removeprefix(f"{PACKAGE}/")
        if room_of(name_of(path)) == "runtime":
            continue
        tree = HOUSE.tree(path)
        engine = {(alias.asname or alias.name).split(".")[0]
                  for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
                  for alias in node.names
                  if starts_with(getattr(node, "module", None) or alias.name, "megatron")}
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else \
                [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else \
                node.args[:1] if isinstance(node, ast.Call) and dotted(node.func) == "setattr" else []
            for target in targets:
                name = dotted(target)
                touched = "." in name or isinstance(node, ast.Call)
                if touched and name.split(".")[0] in engine and (inside, name) not in ENGINE_EXCEPTIONS:
                    wrong.append(where(path, node.lineno, f"alters {name}"))
    assert not wrong, wrong


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.config", f"{PACKAGE}.errors"])
def test_import_is_light(module):
    heavy = ("torch", "megatron", "transformers", "numpy", "safetensors")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_weights_data_and_tokenizer_start_without_torch():
    """Every module of them, imported; a function may import torch when it needs it."""
    modules = [name for name, path in HOUSE.modules.items() if room_of(name) in ("weights", "data", "tokenizer")
               and not path.startswith(READS_FOR_A_RUN)]
    code = (f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
            "print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
