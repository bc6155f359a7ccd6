"""Names below a run's --save directory: whole checkpoints under theirs, everything else under hidden ones.

    SAVE/ITERATION/               whole, always
    SAVE/TRACKER                  names a whole one, always
    SAVE/.saving-XXXX/ITERATION/  being written; of no use after a crash
    SAVE/.replaced-ITERATION/     an older one of the same name, until the new one has its name
    SAVE/.removed-ITERATION/      being deleted
    SAVE/.lease                   which run writes here (lease.py)

A checkpoint gets its name by a rename after it is on the disk, loses it by a rename before anything of it is deleted,
and the tracker is replaced last. A run that is killed before that leaves the new tracker in the draft: `unfinished`
finds it, `finish` puts it into its place. Called by `training/checkpoints/manager.py`, on rank 0; `unfinished` by
`training/start.py`, which changes nothing.
"""

import logging
import shutil
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path

from megatron_mixtral.config import CONFIG_FILE, MixtralConfig
from megatron_mixtral.disk import sync, sync_tree, write_whole
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights import directory as names

logger = logging.getLogger(__name__)

TRACKER, name_of, iterations = names.TRACKER, names.name_of, names.iterations
_SAVING, _REPLACED, _REMOVED = ".saving-", ".replaced-", ".removed-"


def write_identity(save: Path, config: MixtralConfig) -> None:
    """Write `mixtral_config.json`, the identity of the checkpoints. `CheckpointError` where it is another model's."""
    path = save / CONFIG_FILE
    if not path.is_file():
        save.mkdir(parents=True, exist_ok=True)
        write_whole(path, config.to_json())
    elif MixtralConfig.from_checkpoint(save) != config:
        raise CheckpointError(f"--save {save} holds checkpoints of another model ({path} differs from the run's "
                              "architecture): give another directory")


def carry_tokenizer(save: Path, sources: Iterable[str | None]) -> None:
    """Copy the tokenizer and generation files of the first of `sources` (directories, or a file in one) that has some
    into `save`, from where exports take them. Those that are there stay.
    """
    if names.companions_of(save):
        return
    for source in filter(None, sources):
        path = Path(source)
        folder = path.parent if path.is_file() else path  # a name of the hub is neither
        if found := names.companions_of(folder):
            for file in found:
                draft = save / f".{file.name}.draft"
                shutil.copyfile(file, draft)
                sync(draft)
                draft.rename(save / file.name)
            logger.info("tokenizer of %s goes along with the checkpoints", path)
            return


def unfinished(directory: Path) -> tuple[Path, str] | None:
    """A checkpoint that got its name and is not yet named by the tracker, since its run was killed between the two: its
    own tracker, in the draft, and its name.
    """
    for tracker in sorted(directory.glob(f"{_SAVING}*/{TRACKER}")):
        try:
            name = names.latest(tracker.parent)
        except (CheckpointError, FileNotFoundError):  # another rank puts it into its place
            continue
        if name is not None and (directory / name).is_dir() and not (tracker.parent / name).exists():
            return tracker, name
    return None


def finish(directory: Path) -> None:
    """Name the checkpoint that `unfinished` finds. Raises `CheckpointError` where the directory cannot be written."""
    found = unfinished(directory)
    if found is None:
        return
    tracker, name = found
    logger.info("%s is whole, and %s did not say so yet: now it does", directory / name, TRACKER)
    try:
        tracker.rename(directory / TRACKER)
    except OSError as error:
        raise CheckpointError(f"{directory / TRACKER} does not name {name} yet, and cannot be written "
                              f"({error.strerror}): write {names.iteration_of(name)} into it") from error
    sync(directory)


def tidy(save: Path) -> None:
    """Finish or undo what a killed run left. Call when nothing is being saved."""
    finish(save)
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
    write_whole(tracker, str(iteration))  # before the renames, which need no space
    sync_tree(written)
    replaced = save / f"{_REPLACED}{target.name}"
    if target.exists():
        target.rename(replaced)
    written.rename(target)
    sync(save)
    tracker.rename(save / TRACKER)
    sync(save)
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
    """Remove a checkpoint: first its name, then its files. A link is left alone: what it points to is not ours."""
    target, removed = save / name_of(iteration), save / f"{_REMOVED}{name_of(iteration)}"
    if target.is_symlink():
        logger.info("%s is a symbolic link and is kept", target)
        return
    target.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)  # what stays is hidden, and the next start removes it
    logger.info("removed %s", target)
