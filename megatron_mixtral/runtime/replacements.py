"""Replace attributes of modules we do not own, and put them back: `Replacements`; and why we do it: `Fix`.

The stand-ins for CUDA (`cpu/`), the checkpoint manager's way in (`saving.py`) and the repairs (`engine_fixes/`) use it.
A place in the engine is named as `pkgutil.resolve_name` reads it: "module:attribute" or "module:Class.attribute".
"""

import functools
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

_ABSENT = object()


class Replacements:
    """A stack of replaced attributes: `set` replaces one, `undo` restores all in reverse order."""

    def __init__(self) -> None:
        self._saved: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name` and remember what was there; the attribute must exist, so that a renamed seam is noticed."""
        assert hasattr(owner, name), f"{owner!r} has no attribute {name!r}: the engine or torch has changed"
        # What a class inherits must be deleted again on undo, not copied down.
        inherited = isinstance(owner, type) and name not in vars(owner)
        self._saved.append((owner, name, _ABSENT if inherited else getattr(owner, name)))
        setattr(owner, name, value)

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Let `around(original, *args, **kwargs)` answer for the function or method `owner.name`."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        self.set(owner, name, call)

    def undo(self) -> None:
        """Restore everything that `set` replaced."""
        while self._saved:
            owner, name, value = self._saved.pop()
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@dataclass(frozen=True)
class Fix:
    """One repair of the pinned engine: what breaks, why, and when it can go.

    `versions` are the engine versions on which the defect was seen. `needed()` looks at the engine itself, and a test
    asserts it for every repair: the day the engine is upgraded and no longer needs one, that test fails and the repair
    is deleted.
    """

    name: str
    symptom: str
    cause: str
    versions: str
    remove_when: str
    needed: Callable[[], bool]
    apply: Callable[[Replacements], None]


def source_has(place: str, words: str) -> Callable[[], bool]:
    """A `Fix.needed`: whether the source of a function or class of the engine has these words."""
    return lambda: words in inspect.getsource(pkgutil.resolve_name(place))


def around(place: str, function: Callable[..., Any]) -> Callable[[Replacements], None]:
    """A `Fix.apply`: let `function(original, *args, **kwargs)` answer for a function or method of the engine."""
    module, _, path = place.partition(":")
    owner, _, name = path.rpartition(".")
    return lambda replacements: replacements.wrap(pkgutil.resolve_name(f"{module}:{owner}"), name, function)


def apply(replacements: Replacements, fixes: Iterable[Fix]) -> list[str]:
    """Apply every repair of `fixes` that this installation needs; returns their names."""
    applied = []
    for fix in fixes:
        if fix.needed():
            fix.apply(replacements)
            applied.append(fix.name)
    return applied
