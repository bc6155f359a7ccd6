"""Writing a directory so that it is either whole or not there: a temporary name beside it, fsync, rename.

Every sink writes through `staged`. A killed conversion leaves only a hidden `.NAME.partial`, which nothing reads as a
checkpoint and which the next start removes.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_mixtral.errors import CheckpointError

logger = logging.getLogger(__name__)


def is_empty(directory: Path) -> bool:
    """Whether a directory is absent or has nothing in it."""
    return not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))


def refuse_existing(target: Path, replace: bool) -> None:
    """Raise `CheckpointError` when `target` may not be written: it holds something, and `replace` is false."""
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file, expected a directory to write into")
    if not replace and not is_empty(target):
        raise CheckpointError(f"{target} is not empty; choose another --save-dir, or give --overwrite to replace it")


@contextlib.contextmanager
def staged(target: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary directory that becomes `target` when the block ends without an exception.

    With `replace`, what `target` held is removed after the new directory is in its place. On an exception the
    temporary directory is removed and `target` is as it was.
    """
    target = Path(os.path.abspath(target))
    refuse_existing(target, replace)
    partial, old = target.parent / f".{target.name}.partial", target.parent / f".{target.name}.replaced"
    _recover(target, old)
    if partial.exists():
        logger.info("removing %s, left by an unfinished conversion", partial)
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{partial} cannot be made: {error}") from None
    try:
        yield partial
        _sync(partial)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        _sync_one(target.parent)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error
    finally:
        _recover(target, old)
        shutil.rmtree(partial, ignore_errors=True)


def _recover(target: Path, old: Path) -> None:
    """Finish or undo a replacement that was cut short: exactly one of the two names stays."""
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)


def _sync(directory: Path) -> None:
    """Flush every file and directory below to the disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            _sync_one(Path(folder) / name)
        _sync_one(Path(folder))


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
