"""The house rules as tests: who may import whom and past which door, who may touch the machine, how long a file may be.

Each rule is a list of offenders that has to be empty; the message of a failure is the list. docs/design.md says why. A
rule that is a function of a house is also asked about a made-up house that breaks it.
"""

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.house import (
    House,
    circles,
    code_strings,
    dotted,
    name_of,
    past_a_door,
    read_house,
    room_of,
    starts_with,
    where,
)

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_mixtral"
LEVELS = {  # a room imports rooms of lower levels only; rooms of one level do not know each other
    "errors": 0, "disk": 0, "command_line": 0, "_door": 0, "config": 0, "runtime": 1, "tokenizer": 2, "planning": 2,
    "weights": 3, "data": 3, "model": 4, "lora": 5, "inference": 6, "evaluation": 7, "training": 8, "server": 8,
    "__main__": 9,
}  # fmt: skip
FOUNDATION = ("errors", "disk", "command_line", "_door")  # single modules that every room may use, config too
MAX_LINES, MIN_LINES, MAX_TOOL_LINES, MAX_FUNCTION_LINES = 350, 25, 60, 70
MAX_FILES, MAX_NAMES = 10, 10
HOUSE = read_house(ROOT, (PACKAGE, "tools", "tests", "examples", "benchmarks", "docs"))


# -- rooms and doors ---------------------------------------------------------------------------------------------------


def test_every_room_has_a_level():
    assert {room_of(name) for name in HOUSE.modules} - {""} <= set(LEVELS)


def upward(house: House) -> Iterator[str]:
    for name, path in house.modules.items():
        room = room_of(name)
        for line, module, _ in house.imports(path):
            other = room_of(module) if module in house.modules else ""
            if other and room and other != room and LEVELS[other] >= LEVELS[room] and other not in FOUNDATION:
                yield where(path, line, f"{room} imports {other}")


def past_doors(house: House) -> Iterator[str]:
    for path in house.files:
        if path.startswith("tests/") and not path.startswith("tests/unit/"):
            continue  # the tests of whole commands and runs look wherever they must
        for line, module, name in house.imports(path):
            if past_a_door(house, path, module, name):
                yield where(path, line, f"{module} does not offer {name}" if house.is_door(module) else module)


def test_documents_and_scripts_enter_by_doors():
    wrong = []
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.sh"), ROOT / "Makefile"]:
        place, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        for module, names in re.findall(rf"from ({PACKAGE}[\w.]*) import ([\w, ]+)", text):
            wrong += [f"{place}: {module}: {name}" for name in names.replace(" ", "").split(",")
                      if module not in HOUSE.modules or past_a_door(HOUSE, place, module, name)]
        wrong += [f"{place}: import {module}" for module in re.findall(rf"(?m)^import ({PACKAGE}[\w.]*)", text)
                  if module not in HOUSE.modules or past_a_door(HOUSE, place, module, None)]
    assert not wrong, wrong


def in_circles(house: House) -> Iterator[str]:
    return (" <-> ".join(circle) for circle in circles(house.edges()))


def large_doors(house: House) -> Iterator[str]:
    for name, path in house.modules.items():
        if house.is_door(name) and len(offered := house.offered(name)) > MAX_NAMES:
            yield f"{path}: {len(offered)} names: {', '.join(offered)}"


def full_folders(house: House) -> Iterator[str]:
    count = Counter(path.rpartition("/")[0] for path in house.below(PACKAGE, "tests/unit")
                    if not path.endswith("__init__.py"))
    return (f"{folder}: {files} files, at most {MAX_FILES}" for folder, files in count.items() if files > MAX_FILES)


def long_or_short(house: House) -> Iterator[str]:
    for path, text in house.files.items():
        lines = len(text.splitlines())
        most = MAX_TOOL_LINES if path.startswith("tools/") else MAX_LINES
        if lines > most:
            yield f"{path}: {lines} lines, at most {most}"
        if lines < MIN_LINES and path in house.below(PACKAGE, "tests/unit") and not path.endswith("__init__.py"):
            yield f"{path}: {lines} lines, at least {MIN_LINES}"
        for node in ast.walk(house.tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = node.end_lineno - node.lineno + 1
                if size > MAX_FUNCTION_LINES:
                    yield where(path, node.lineno, f"{node.name}: {size} lines, at most {MAX_FUNCTION_LINES}")


def without_mirror(house: House) -> Iterator[str]:
    """Rooms without unit tests, and folders of unit tests that are no room."""
    rooms = {room_of(name) for name in house.modules if house.is_door(name)} - {""}
    tested = {path.rpartition("/")[0].removeprefix("tests/unit/") for path in house.below("tests/unit")
              if path.count("/") > 2}
    packages = {name_of(path).removeprefix(f"{PACKAGE}.").replace(".", "/") for path in house.below(PACKAGE)
                if path.endswith("__init__.py")}
    yield from (f"{PACKAGE}/{room} has no tests in tests/unit/{room}" for room in sorted(rooms)
                if not any(starts_with(folder.replace("/", "."), room) for folder in tested))
    yield from (f"tests/unit/{folder} is no folder of {PACKAGE}" for folder in sorted(tested - packages))


def prints(house: House) -> Iterator[str]:
    for path in house.below(PACKAGE):
        if path.rpartition("/")[2] not in ("cli.py", "__main__.py"):
            yield from (where(path, node.lineno, "print") for node in ast.walk(house.tree(path))
                        if isinstance(node, ast.Call) and dotted(node.func) == "print")


def path_edits(house: House) -> Iterator[str]:
    """`sys.path` may be changed in one place, which is in tools; tests have theirs from pyproject.toml."""
    folders = (PACKAGE, "tools", "examples", "benchmarks", "docs")
    found = [where(path, node.lineno, "sys.path") for path in house.below(*folders)
             for node in ast.walk(house.tree(path)) if dotted(node) == "sys.path"]
    first = next((place for place in found if place.startswith("tools/")), None)
    return (place for place in found if place != first)


# -- one fact, one place -----------------------------------------------------------------------------------------------

FACTS: dict[str, Callable[[ast.AST], bool]] = {
    "the tracker's name": lambda node: isinstance(node, ast.Constant)
    and "latest_checkpointed_iteration" in str(node.value),
    "the name of an iteration": lambda node: isinstance(node, ast.Constant | ast.JoinedStr)
    and bool(re.search(r"iter_(%07d|\{[^}]*:07d?\})", ast.unparse(node))),
    "the window rule": lambda node: isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub)
    and bool(re.search(r"sliding_window - 1$", ast.unparse(node))),
    "free space": lambda node: isinstance(node, ast.Attribute) and node.attr == "disk_usage",
    "decimal units of sizes": lambda node: isinstance(node, ast.Tuple | ast.List)
    and {"GB", "MB", "kB"} <= {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
    and not any(isinstance(part, ast.Dict) for part in ast.walk(node)),
}
DISK = "megatron_mixtral/disk.py"  # the place of every fsync, which may take more than one line there


def repeated_facts(house: House) -> Iterator[str]:
    nodes = [(path, node) for path in house.below(PACKAGE) for node in code_strings(house.tree(path))]
    for fact, states in FACTS.items():
        found = [where(path, node.lineno, fact) for path, node in nodes if states(node)]
        if len(found) > 1:
            yield f"{fact} stands {len(found)} times: {', '.join(found)}"
    yield from (where(path, node.lineno, "os.fsync") for path, node in nodes
                if dotted(node) == "os.fsync" and path != DISK)


RULES = [upward, past_doors, in_circles, large_doors, full_folders, long_or_short, without_mirror, prints, path_edits,
         repeated_facts]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    offenders = list(rule(HOUSE))
    assert not offenders, "\n".join(["", *offenders])


LINES = '"""Made up."""\n' * MIN_LINES
DOOR = "from typing import TYPE_CHECKING\nfrom megatron_mixtral._door import door\nif TYPE_CHECKING:\n    "
OFFENDERS = [  # (rule, a house, the word of its offence)
    (upward, {"config/a.py": "from megatron_mixtral.model import build"}, "config imports model"),
    (upward, {"data/a.py": "def f():\n    import megatron_mixtral.weights.plan"}, "data imports weights"),
    (past_doors, {"data/a.py": "from megatron_mixtral.tokenizer.encode import x"}, "megatron_mixtral.tokenizer.encode"),
    (past_doors, {"weights/a.py": "from megatron_mixtral.weights.formats import hf"}, "weights.formats.hf"),
    (past_doors, {"data/a.py": "from megatron_mixtral.tokenizer import encode"}, "megatron_mixtral.tokenizer.encode"),
    (past_doors, {"data/a.py": "from megatron_mixtral.tokenizer import unknown"}, "does not offer unknown"),
    (past_doors, {"../tools/a.py": "from megatron_mixtral.weights.plan import x"}, "megatron_mixtral.weights.plan"),
    (past_doors, {"../tests/unit/data/test_a.py": "from megatron_mixtral.weights.plan import x"}, "weights.plan"),
    (in_circles, {"data/a.py": "from megatron_mixtral.data import f", "data/__init__.py":
                  DOOR + "from megatron_mixtral.data.a import f"}, "data <-> megatron_mixtral.data.a"),
    (in_circles, {"data/a.py": "def f():\n    from megatron_mixtral.data import b",
                  "data/b.py": "import megatron_mixtral.data.a"}, "data.a <-> megatron_mixtral.data.b"),
    (large_doors, {"data/__init__.py": DOOR + "from megatron_mixtral.data.a import " + ", ".join("abcdefghijk")}, "11"),
    (full_folders, {f"data/{letter}.py": LINES for letter in "abcdefghijk"}, "11 files"),
    (long_or_short, {"data/a.py": LINES * 20}, "500 lines"), (long_or_short, {"data/a.py": "x = 1"}, "1 lines"),
    (long_or_short, {"data/a.py": "def f():\n" + "    x = 1\n" * 70}, "f: 71 lines"),
    (without_mirror, {"lora/__init__.py": ""}, "megatron_mixtral/lora has no tests"),
    (without_mirror, {"../tests/unit/nowhere/test_a.py": ""}, "tests/unit/nowhere is no folder"),
    (prints, {"data/a.py": "print(1)"}, "print"),
    (path_edits, {"../benchmarks/a.py": "import sys\nsys.path.insert(0, '')"}, "sys.path"),
    (repeated_facts, {"data/a.py": "x = f'iter_{n:07d}'", "data/b.py": "y = 'iter_%07d'"}, "iteration stands 2"),
    (repeated_facts, {"data/a.py": "x = 'latest_checkpointed_iteration.txt'\ny = x or 'latest_checkpointed_iteration'"},
     "tracker's name stands 2"),
    (repeated_facts, {"data/a.py": "x = c.sliding_window - 1\ny = sliding_window - 1"}, "window rule stands 2"),
    (repeated_facts, {"data/a.py": "import os\nos.fsync(1)"}, "os.fsync"),
    (repeated_facts, {"data/a.py": "shutil.disk_usage(1)\nshutil.disk_usage(2)"}, "free space stands 2"),
    (repeated_facts, {"data/a.py": "x = ('GB', 'MB', 'kB')\ny = (('GB', 9), ('MB', 6), ('kB', 3))"}, "units of sizes"),
]
ROOMS = {"__init__.py": "", "data/__init__.py": "", "weights/__init__.py": "", "weights/plan.py": "x = 1",
         "weights/formats/__init__.py": "", "weights/formats/hf.py": "from megatron_mixtral.weights.plan import x",
         "model/__init__.py": "def build(): ...", "tokenizer/__init__.py": "", "tokenizer/encode.py": "x = 1"}


@pytest.mark.parametrize(("rule", "files", "offence"), OFFENDERS, ids=lambda value: getattr(value, "__name__", ""))
def test_an_offender_is_found(rule, files, offence):
    made_up = {path.removeprefix("../") if path.startswith("../") else f"{PACKAGE}/{path}": text
               for path, text in (ROOMS | files).items()}
    assert offence in "\n".join(rule(House(made_up)))
    whole = House({f"{PACKAGE}/{path}": text for path, text in ROOMS.items()})
    assert rule in (long_or_short, without_mirror) or not list(rule(whole))


# -- every file -------------------------------------------------------------------------------------------------------


def test_no_bare_except():
    wrong = [where(path, node.lineno, "bare except") for path in HOUSE.files for node in ast.walk(HOUSE.tree(path))
             if isinstance(node, ast.ExceptHandler) and node.type is None]
    assert not wrong, wrong


def test_every_module_says_what_it_is():
    wrong = [path for path, text in HOUSE.files.items() if text.strip() and not ast.get_docstring(HOUSE.tree(path))]
    assert not wrong, wrong


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
        wrong += [where(str(path.relative_to(ROOT)), number, line.strip()[:100])
                  for number, line in enumerate(text.splitlines(), 1) if bad.search(line)]
    assert not wrong, wrong
