"""The package as a house: files, doors, imports. What the architecture test asks; made-up houses are asked the same."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PACKAGE = "megatron_mixtral"


@dataclass(frozen=True)
class House:
    """Python files by their path from the root, as text; the package is `megatron_mixtral/`."""

    files: dict[str, str]
    _trees: dict[str, ast.Module] = field(default_factory=dict, repr=False)

    def tree(self, path: str) -> ast.Module:
        if path not in self._trees:
            self._trees[path] = ast.parse(self.files[path], path)
        return self._trees[path]

    def below(self, *folders: str) -> list[str]:
        return [path for path in self.files if path.startswith(tuple(f"{folder}/" for folder in folders))]

    @cached_property
    def modules(self) -> dict[str, str]:
        """Dotted name -> path, of everything in the package; a package's name is that of its `__init__`."""
        return {name_of(path): path for path in self.below(PACKAGE)}

    def is_door(self, module: str) -> bool:
        return self.modules.get(module, "").endswith("__init__.py")

    def offered(self, door: str) -> list[str]:
        """The names that a door lists under TYPE_CHECKING; of a plain `__init__`, its literal `__all__`, or without one
        what it imports and defines.
        """
        body = self.tree(self.modules[door]).body
        for node in body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" \
                    and isinstance(node.value, ast.List):
                return list(ast.literal_eval(node.value))
        listed = [node for block in body if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
                  for node in block.body]
        names = []
        for node in listed or [node for node in body if not _is_machinery(node)]:
            if isinstance(node, ast.ImportFrom):
                names += [alias.asname or alias.name for alias in node.names]
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.append(node.name)
            elif isinstance(node, ast.Assign):
                names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        return [name for name in names if not name.startswith("__")]

    def imports(self, path: str) -> Iterator[tuple[int, str, str | None]]:
        """(line, module, name) of every import at any depth. Where `from a import b` means the module `a.b`, which no
        door offers under that name, the module is `a.b` and the name None.
        """
        for node in ast.walk(self.tree(path)):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name, None) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    if inner in self.modules and (self.is_door(inner) or not self._offers(node.module, alias.name)):
                        yield node.lineno, inner, None
                    else:
                        yield node.lineno, node.module or "", alias.name

    def _offers(self, door: str | None, name: str) -> bool:
        return door in self.modules and self.is_door(door) and name in self.offered(door)

    def edges(self) -> dict[str, set[str]]:
        """Module -> the modules of the package that it imports. A door's list counts as the door's imports."""
        found: dict[str, set[str]] = {name: set() for name in self.modules}
        for name, path in self.modules.items():
            for _, module, inner in self.imports(path):
                own = f"{module}.{inner}" if path.endswith("__init__.py") and module == name else module
                if own in found and own != name:
                    found[name].add(own)
        return found


def _is_machinery(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module in ("typing", f"{PACKAGE}._door")


def name_of(path: str) -> str:
    """`megatron_mixtral/data/__init__.py` -> `megatron_mixtral.data`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(module: str) -> str:
    """`megatron_mixtral.data.corpus.readers` -> data; of the package itself, ''."""
    return ".".join(module.split(".")[1:2])


def read_house(root: Path, folders: Iterable[str]) -> House:
    paths = sorted(path for folder in folders for path in (root / folder).rglob("*.py")
                   if not path.is_symlink())
    return House({path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths})


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for target in sorted(edges[node]):
            if target not in order:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in stack:
                lowest[node] = min(lowest[node], order[target])
        if lowest[node] == order[node]:
            place = stack.index(node)
            if len(stack) > place + 1:
                found.append(sorted(stack[place:]))
            del stack[place:]

    for node in sorted(edges):
        if node not in order:
            visit(node)
    return found


def past_a_door(house: House, path: str, module: str, name: str | None) -> bool:
    """Whether an import reaches into a room. Open to a file: doors, by the names that they offer; the modules of its
    own folder and of the folders above, inside of its room; the single modules beside the rooms. A unit test counts as
    a file of the room that it tests.
    """
    if not module.startswith(PACKAGE) or module not in house.modules:
        return False
    if house.is_door(module):
        return name is not None and name not in house.offered(module) and not name.startswith("__")
    folder = module.rpartition(".")[0]
    if module == f"{PACKAGE}.__main__":  # the door of the programs
        return path.startswith(f"{PACKAGE}/")
    if folder == PACKAGE:
        return not path.startswith(f"{PACKAGE}/") and module.startswith(f"{PACKAGE}._")
    if path.startswith("tests/unit/"):
        return room_of(module) != path.split("/")[2]
    own = name_of(path) if path.endswith("__init__.py") else name_of(path).rpartition(".")[0]
    return not f"{own}.".startswith(f"{folder}.")


def code_strings(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node of a file but docstrings."""
    documents = {id(node.body[0].value) for node in ast.walk(tree)
                 if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                 and node.body and isinstance(node.body[0], ast.Expr)}
    return (node for node in ast.walk(tree) if id(node) not in documents)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, '' of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := dotted(node.value)):
        return f"{left}.{node.attr}"
    return ""


def where(path: str, line: int, what: str) -> str:
    return f"{path}:{line}: {what}"


def starts_with(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)
