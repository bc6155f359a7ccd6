"""Writing a directory so that it is either whole or not there: a temporary name beside it, fsync, rename.

Every conversion writes through `staged`. A killed one leaves only a hidden `.NAME.partial`, which nothing reads as a
checkpoint and which the next start removes, or takes up where it can.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_mixtral.disk import existing_parent, free_space, human_size, sync, sync_tree, write_whole
from megatron_mixtral.errors import CheckpointError

logger = logging.getLogger(__name__)

PARTIAL = ".partial"  # ends the temporary directory's name
NOTES = ".conversion"  # in the temporary directory only


def is_empty(directory: Path) -> bool:
    """Whether a directory is absent or has nothing in it."""
    return not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))


def is_unfinished(directory: Path) -> bool:
    """Whether a directory is, or was until its last rename, one that is being written."""
    return (directory / NOTES).exists() or directory.name.endswith(PARTIAL)


def refuse_existing(target: Path, replace: bool) -> None:
    """Raise `CheckpointError` when `target` may not be written: it holds something, and `replace` is false.

    Nor through a symbolic link, also under the temporary names: anyone may put one into a shared directory.
    """
    for path in (target, partial_of(target), _replaced(target)):
        if path.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link to {os.readlink(path)}, expected a directory or nothing; "
                                  "remove it, or give --save-dir without a link as its last part")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file, expected a directory to write into")
    if not replace and not is_empty(target):
        raise CheckpointError(f"{target} is not empty; choose another --save-dir, or give --overwrite to replace it")


def need_space(target: Path, needed: int) -> None:
    """Raise `CheckpointError` when the disk that `target` will be on has less than `needed` bytes free."""
    left = partial_of(target)  # of an unfinished conversion: will be removed or used
    free = free_space(target) + sum(path.lstat().st_blocks * 512 for path in left.rglob("*"))
    if free < needed:
        raise CheckpointError(f"{target} needs {human_size(needed)}, but {existing_parent(target)} has "
                              f"{human_size(free)} free")


class Stage:
    """A directory being written, and what of it is finished, so that a killed conversion can be taken up again."""

    def __init__(self, root: Path) -> None:
        self.root, self._notes = root, root / NOTES

    def begin(self, fingerprint: str) -> None:
        """Say what is being written; finished files of anything else are removed."""
        plan = self._notes / "plan"
        if not plan.is_file() or plan.read_text(encoding="utf-8") != fingerprint:
            for path in self.root.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            self._notes.mkdir()
            plan.write_text(fingerprint, encoding="utf-8")

    def _note(self, path: str) -> Path:
        return self._notes / f"{path.replace('/', '+')}.json"

    def finished(self, path: str, size: int) -> list[str] | None:
        """What was noted about a finished file of this size; None: it must be written."""
        try:
            if (self.root / path).stat().st_size != size:
                return None
            return list(json.loads(self._note(path).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def note(self, path: str, remarks: list[str]) -> None:
        """Note that a file is whole and on the disk. Under its name the note is whole, or not there."""
        write_whole(self._note(path), json.dumps(remarks))


@contextlib.contextmanager
def staged(target: Path, replace: bool = False, resume: bool = False) -> Iterator[Stage]:
    """A temporary directory that becomes `target` when the block ends without an exception.

    With `replace`, what `target` held is removed after the new directory is in its place. With `resume`, what an
    unfinished conversion left is there for `Stage.begin` to judge. On an exception the temporary directory is
    removed and `target` is as it was. Two conversions to one target exclude each other.
    """
    target = Path(os.path.abspath(target))
    refuse_existing(target, replace)
    partial, old = partial_of(target), _replaced(target)
    with _exclusive(target, partial) as lock:
        try:
            _recover(target, old)
            stage = Stage(partial)
            if any(partial.iterdir()) and not resume:
                logger.info("removing what an unfinished conversion left in %s", partial)
                stage.begin("")
            yield stage
            shutil.rmtree(partial / NOTES, ignore_errors=True)
            sync_tree(partial)
            if target.exists():
                target.rename(old)
            partial.rename(target)
            sync(target.parent)
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {error}") from error
        finally:
            _recover(target, old)
            if _is_at(lock, partial):  # else it has become the target, and this may be the next conversion's
                shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _exclusive(target: Path, partial: Path) -> Iterator[int]:
    """The temporary directory, made, opened and locked. Raises `CheckpointError` when another conversion has it.

    The lock goes with the directory when it becomes the target, so a target is locked too: until what it replaced is
    removed, the next conversion must not begin.
    """
    with contextlib.ExitStack() as handles:
        lock = _open_own(partial)
        handles.callback(os.close, lock)
        _lock(lock, partial)
        if target.exists():
            try:
                there = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                handles.callback(os.close, there)
                _lock(there, target)
            except (OSError, CheckpointError) as error:
                with contextlib.suppress(OSError):
                    partial.rmdir()  # goes where it is empty
                raise CheckpointError(f"{target} cannot be replaced: {error}") from None
        yield lock


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(handle, path):  # no longer, when the other one ended in between
            return
    except OSError:
        pass
    raise CheckpointError(f"{path} is being written by another conversion; wait for it or stop it")


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open directory is the one of this name."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except OSError:
        return False


def partial_of(target: Path) -> Path:
    """The temporary directory of a target."""
    target = Path(os.path.abspath(target))
    return target.parent / f".{target.name}{PARTIAL}"


def _replaced(target: Path) -> Path:
    return partial_of(target).with_suffix(".replaced")


def _open_own(partial: Path) -> int:
    """The temporary directory opened, made where it is absent. Raises `CheckpointError` for another user's."""
    try:
        made = True
        try:
            partial.mkdir(parents=True)
        except FileExistsError:
            made = False
        handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise CheckpointError(f"{partial} cannot be made: {error}") from None
    if not made and os.fstat(handle).st_uid != os.geteuid():
        os.close(handle)
        raise CheckpointError(f"{partial} belongs to another user and would be emptied; remove it, or choose another "
                              "--save-dir")
    return handle


def _recover(target: Path, old: Path) -> None:
    """Finish or undo a replacement that was cut short: exactly one of the two names stays."""
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)
