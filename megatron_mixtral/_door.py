"""A room's door: the names that its `__init__` offers, each imported when it is first asked for.

An `__init__` lists its names once, under `TYPE_CHECKING`, where type checkers and editors read them:

    if TYPE_CHECKING:
        from megatron_mixtral.weights.conversion import Report, convert
    __all__, __getattr__, __dir__ = door(__name__, __file__)

So `import megatron_mixtral.weights` costs nothing, and asking for `convert` imports `weights/conversion.py` alone.
"""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def door(package: str, file: str) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """`__all__`, `__getattr__` and `__dir__` (PEP 562) of the package whose `__init__` is `file`."""
    body = ast.parse(Path(file).read_text(encoding="utf-8")).body
    listed = [node for block in body if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
              for node in block.body if isinstance(node, ast.ImportFrom)]
    places = {alias.asname or alias.name: (node.module or "", alias.name) for node in listed for alias in node.names}

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it offers {', '.join(sorted(places))}")
        module, original = places[name]
        if module == package:  # a module of the room, offered as such
            value = importlib.import_module(f"{module}.{original}")
        else:
            value = getattr(importlib.import_module(module), original)
        setattr(sys.modules[package], name, value)
        return value

    return sorted(places), get, lambda: sorted(places)
