"""Replace attributes of modules we do not own, and put them back. Used by the repairs and the CPU stand-in."""

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
