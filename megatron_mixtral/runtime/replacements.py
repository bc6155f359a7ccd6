"""Replace attributes of modules we do not own, and put them back: `Replacements`; and why we do it: `Fix`.

The stand-ins for CUDA (`cpu/`), the checkpoint manager's way in (`saving.py`) and the repairs (`engine_fixes/`) use it.
"""

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

    def undo(self) -> None:
        """Restore everything that `set` replaced."""
        while self._saved:
            owner, name, value = self._saved.pop()
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)

    def __len__(self) -> int:
        return len(self._saved)


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


def apply(replacements: Replacements, fixes: Iterable[Fix]) -> list[str]:
    """Apply every repair of `fixes` that this installation needs; returns their names."""
    applied = []
    for fix in fixes:
        if fix.needed():
            fix.apply(replacements)
            applied.append(fix.name)
    return applied
