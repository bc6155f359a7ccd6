"""Names below a run's --save directory: whole checkpoints under theirs, everything else under hidden ones.

    SAVE/iter_0000100/                      whole, always
    SAVE/latest_checkpointed_iteration.txt  names a whole one, always
    SAVE/.saving-XXXX/iter_0000200/         being written; of no use after a crash
    SAVE/.replaced-iter_0000100/            an older one of the same name, until the new one has its name
    SAVE/.removed-iter_0000050/             being deleted

A checkpoint gets its name by a rename after it is on the disk, loses it by a rename before anything of it is deleted,
and the tracker is replaced last. Called by `training/checkpoints/manager.py`, on rank 0.
"""

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

from megatron_mixtral.training.arguments import TRACKER

logger = logging.getLogger(__name__)

_SAVING, _REPLACED, _REMOVED = ".saving-", ".replaced-", ".removed-"


def name_of(iteration: int) -> str:
    """The engine's directory name of an iteration."""
    return f"iter_{iteration:07d}"


def iterations(save: Path) -> list[int]:
    """Iterations of the checkpoints below `save`, ascending; none where there is no such directory."""
    if not save.is_dir():
        return []
    found = (re.fullmatch(r"iter_(\d{7,})", path.name) for path in save.iterdir())
    return sorted(int(match[1]) for match in found if match)


def tidy(save: Path) -> None:
    """Finish or undo what a killed run left. Call when nothing is being saved."""
    for path in sorted(save.glob(".*-*")):
        if path.name.startswith(_REPLACED) and not (save / path.name.removeprefix(_REPLACED)).exists():
            path.rename(save / path.name.removeprefix(_REPLACED))  # killed between the two renames of `publish`
        elif path.name.startswith((_SAVING, _REPLACED, _REMOVED)):
            logger.info("removing %s, which an interrupted run left", path)
            shutil.rmtree(path, ignore_errors=True)  # a background writer that outlived its run may still add to it


def draft(save: Path, iteration: int) -> Path:
    """A new hidden directory for one save, with the iteration's directory in it. Its name is of its own: a background
    writer that outlives a killed run must not write among the files of the next one. Raises `OSError`.
    """
    save.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=_SAVING, dir=save))
    (folder / name_of(iteration)).mkdir()
    return folder


def discard(folder: Path) -> None:
    """Remove a draft, and with it what it takes on the disk."""
    shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, save: Path, iteration: int) -> Path:
    """Give the draft's checkpoint its name, and make it the latest. Raises `OSError`; then the tracker is as before."""
    written, target = folder / name_of(iteration), save / name_of(iteration)
    tracker = folder / TRACKER
    with tracker.open("w", encoding="utf-8") as stream:  # before the renames, which need no space
        stream.write(str(iteration))
        stream.flush()
        os.fsync(stream.fileno())
    for path in (*written.rglob("*"), written):
        _sync(path)
    replaced = save / f"{_REPLACED}{target.name}"
    if target.exists():
        target.rename(replaced)
    written.rename(target)
    _sync(save)
    tracker.rename(save / TRACKER)
    _sync(save)
    for left in (replaced, folder):
        shutil.rmtree(left, ignore_errors=True)
    return target


def surplus(found: Collection[int], newest: int, limit: int | None, multiples: int | None,
            in_use: Collection[int] = ()) -> list[int]:
    """Which checkpoints to remove once `newest` is whole.

    Kept are the `limit` last ones up to `newest`, those whose iteration is a multiple of `multiples`, those in use, and
    those after `newest` (a run that was taken back to an earlier one). No limit and no multiples: all are kept.
    """
    if limit is None and multiples is None:
        return []
    older = sorted(iteration for iteration in found if iteration <= newest)
    kept = set(older[-(limit or 1):]) | {newest} | set(in_use)
    return [iteration for iteration in older
            if iteration not in kept and not (multiples and iteration % multiples == 0)]


def remove(save: Path, iteration: int) -> None:
    """Take a checkpoint its name, then delete it. A link is left alone: what it points to is not ours."""
    target, removed = save / name_of(iteration), save / f"{_REMOVED}{name_of(iteration)}"
    if target.is_symlink():
        logger.info("%s is a symbolic link and is kept", target)
        return
    target.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)  # what stays is hidden, and the next start removes it
    logger.info("removed %s", target)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
