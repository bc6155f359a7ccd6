"""The house rules as tests: who may import whom, who may touch the machine, how long a file may be.

Each rule is a list of offenders that has to be empty; the message of a failure is the list.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_mixtral"
LEVELS = {  # a room imports rooms of lower levels only; rooms of one level do not know each other
    "errors": 0, "disk": 0, "_door": 0, "config": 0, "runtime": 1, "tokenizer": 2, "planning": 2, "weights": 3,
    "data": 3, "model": 4, "lora": 5, "inference": 6, "evaluation": 7, "training": 8, "server": 8, "__main__": 9,
}  # fmt: skip
MAX_LINES, MAX_TOOL_LINES, MAX_FUNCTION_LINES = 350, 60, 70


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def room_of(path: Path) -> str:
    """`megatron_mixtral/data/corpus/readers.py` -> data, `megatron_mixtral/errors.py` -> errors."""
    return path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_of(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, dotted name) of everything imported, at any depth; `from a import b` counts as a and as a.b."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            found += [(node.lineno, node.module), *((node.lineno, f"{node.module}.{a.name}") for a in node.names)]
    return found


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, '' of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := dotted(node.value)):
        return f"{left}.{node.attr}"
    return ""


def where(path: Path, line: int, what: str) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {what}"


def starts_with(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


LIBRARY = python_files(PACKAGE)


def test_every_room_has_a_level():
    rooms = {room_of(path) for path in LIBRARY} - {"__init__"}
    assert rooms <= set(LEVELS)


def test_imports_point_downwards():
    wrong = []
    for path in LIBRARY:
        room = room_of(path)
        for line, name in imports_of(tree_of(path)):
            other = name.split(".")[1] if name.startswith(PACKAGE + ".") else None
            if other in LEVELS and room in LEVELS and other != room \
                    and LEVELS[other] >= LEVELS[room] and other not in ("errors", "disk", "_door"):
                wrong.append(where(path, line, f"{room} imports {other}"))
    assert not wrong, wrong


FORBIDDEN = {  # room -> modules that it does without
    "errors": ["torch", "megatron", "transformers", "numpy"],
    "config": ["torch", "megatron", "transformers", "numpy", "safetensors"],
    "weights": ["megatron", "transformers", "torch.distributed"],
}


def test_rooms_do_without():
    wrong = []
    for path in LIBRARY:
        room = room_of(path)
        banned = list(FORBIDDEN.get(room, []))
        if room not in ("runtime", "training"):
            banned.append("megatron.training")
        if room != "runtime":
            banned += ["transformer_engine", "apex", "torch.cuda"]
        wrong += [where(path, line, f"{room} imports {name}") for line, name in imports_of(tree_of(path))
                  if starts_with(name, *banned)]
    assert not wrong, wrong


# (file, dotted name) that may. A list that should only become shorter.
MACHINE_EXCEPTIONS = {
    ("data/cli.py", "os.environ"),  # handed to a pure function
    ("training/cli.py", "os.environ"),  # RANK
    ("__main__.py", "os.environ"),  # what has to be set before numpy is imported
    ("training/pretrain.py", "os.environ"),  # handed to a pure function, before torch is imported
    ("training/pretrain.py", "torch.cuda.current_device"),  # the engine's name of this rank's device; runtime answers
}
ENGINE_EXCEPTIONS = {
    ("training/metrics/hooks.py", "global_vars._GLOBAL_TENSORBOARD_WRITER"),  # the engine has no setter for its writer
}


def test_only_the_runtime_touches_the_machine():
    """torch.cuda and the environment have one owner. `training` may read the engine's arguments, nothing else does."""
    wrong = []
    for path in LIBRARY:
        room, inside = room_of(path), path.relative_to(ROOT / PACKAGE).as_posix()
        if room == "runtime":
            continue
        tree = tree_of(path)
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
        inside = path.relative_to(ROOT / PACKAGE).as_posix()
        if room_of(path) == "runtime":
            continue
        tree = tree_of(path)
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


def test_files_and_functions_are_short():
    wrong = []
    for path in python_files(PACKAGE, "tools", "tests", "examples"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        most = MAX_TOOL_LINES if path.is_relative_to(ROOT / "tools") else MAX_LINES
        if lines > most:
            wrong.append(f"{path.relative_to(ROOT)}: {lines} lines, at most {most}")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = node.end_lineno - node.lineno + 1
                if size > MAX_FUNCTION_LINES:
                    wrong.append(where(path, node.lineno, f"{node.name}: {size} lines, at most {MAX_FUNCTION_LINES}"))
    assert not wrong, wrong


def test_no_print_in_the_library_and_no_bare_except():
    wrong = []
    for path in (path for path in LIBRARY if path.name not in ("cli.py", "__main__.py")):  # commands print
        wrong += [where(path, node.lineno, "print") for node in ast.walk(tree_of(path))
                  if isinstance(node, ast.Call) and dotted(node.func) == "print"]
    for path in python_files(PACKAGE, "tools", "tests", "examples"):
        wrong += [where(path, node.lineno, "bare except") for node in ast.walk(tree_of(path))
                  if isinstance(node, ast.ExceptHandler) and node.type is None]
    assert not wrong, wrong


def test_every_module_says_what_it_is():
    wrong = [str(path.relative_to(ROOT)) for path in python_files(PACKAGE, "tools", "tests", "examples")
             if path.read_text(encoding="utf-8").strip() and not ast.get_docstring(tree_of(path))]
    assert not wrong, wrong


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.config", f"{PACKAGE}.errors"])
def test_import_is_light(module):
    heavy = ("torch", "megatron", "transformers", "numpy", "safetensors")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:  # an unpacked archive
        return [path for path in ROOT.rglob("*") if path.is_file() and not set(path.parts) & {".venv", ".git"}]
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_nothing_of_one_machine_is_in_the_tree():
    """Absolute paths of a developer's machine, host names of package registries, and marks of unfinished work."""
    bad = re.compile(r"/roo[t]/|/hom[e]/\w|/User[s]/\w|/wor[k]/|"
                     r"\bpyp[i]\.org|pythonhoste[d]\.org|\bTOD[O]\b|\bFIXM[E]\b")
    wrong = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        wrong += [where(path, number, line.strip()[:100]) for number, line in enumerate(text.splitlines(), 1)
                  if bad.search(line)]
    assert not wrong, wrong
