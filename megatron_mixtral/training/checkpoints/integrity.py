"""The checksums of a checkpoint: `integrity.json`, in the engine's own form, made and compared by all ranks at once.

The engine writes this file only with --verify-integrity, by reading everything again on rank 0. Here each rank sums the
files that it wrote, an asynchronous save in its background process, so that it costs a fraction and every checkpoint
has it. Form: {"algorithm": "sha256", "files": {name: hex digest}}, as `megatron.core.dist_checkpointing.validation`
of the pinned version reads it. Standard library only: the background process of a save imports this module.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mixtral.disk import write_whole
from megatron_mixtral.errors import CheckpointError

MANIFEST = "integrity.json"
ALGORITHM = "sha256"


def digest(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, ALGORITHM).hexdigest()


def files_of(directory: Path) -> list[str]:
    """Every file of a checkpoint but the manifest, as names below it, sorted."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*")
                  if path.is_file() and path.name != MANIFEST)


def sum_share(directory: Path, rank: int) -> None:
    """Sum the files that `rank` wrote into `directory`, and note the sums beside it (`sums.RANK`)."""
    sums = {path.name: digest(path) for path in directory.glob(f"__{rank}_*")}
    (directory.parent / f"sums.{rank}").write_text(json.dumps(sums), encoding="utf-8")


def write_then_sum(write: Callable[..., Any], directory: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """The engine's `write` of one rank's files, and then their sums; run in the background process of a save."""
    write(*args, **kwargs)
    try:
        sum_share(directory, rank)
    except OSError:
        pass  # what has no sum is summed when the manifest is written; a failure of the disk shows there


def write_manifest(directory: Path) -> None:
    """Join the ranks' notes into the manifest of `directory`; what no rank summed is summed here. Raises `OSError`."""
    noted: dict[str, str] = {}
    for note in directory.parent.glob("sums.*"):
        try:
            noted |= json.loads(note.read_text(encoding="utf-8"))
        except ValueError:  # cut short by a full disk
            continue
    sums = {name: noted.get(name) or digest(directory / name) for name in files_of(directory)}
    write_whole(directory / MANIFEST, json.dumps({"algorithm": ALGORITHM, "files": sums}, indent=1))


class NoSumsError(CheckpointError):
    """There is nothing to compare a checkpoint with, which says nothing against it."""


def read_manifest(directory: Path) -> dict[str, str]:
    """The sums by file name. Raises `NoSumsError` where there is no manifest, or one of another kind, and
    `CheckpointError` where it cannot be read.
    """
    path = directory / MANIFEST
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        algorithm, sums = contents["algorithm"], dict(contents["files"])
    except FileNotFoundError:
        raise NoSumsError(f"{directory} has no {MANIFEST}, so there is nothing to compare its files with (converted "
                          "checkpoints have none: tools/checkpoint/inspect_checkpoint.py looks at them)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; --no-verify-checkpoint loads the checkpoint without "
                              "comparing its files") from None
    if algorithm != ALGORITHM:
        raise NoSumsError(f"{path} has sums by {algorithm!r}, expected {ALGORITHM!r}, so its files are not compared")
    return sums


def damage(directory: Path, sums: dict[str, str], rank: int = 0, ranks: int = 1) -> list[str]:
    """What is wrong with the share of files that falls to `rank`; every rank finds its own, together all of them.

    They are dealt out by size, largest first, so that no rank has much more to read than another.
    """
    sizes = {name: (directory / name).stat().st_size if (directory / name).is_file() else 0 for name in sums}
    share = sorted(sums, key=lambda name: (-sizes[name], name))[rank::ranks]
    return [problem for name in share if (problem := _problem(directory / name, name, sums[name])) is not None]


def _problem(path: Path, name: str, expected: str) -> str | None:
    try:
        found = digest(path)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None if found == expected else f"{name} has {ALGORITHM} {found[:12]}..., expected {expected[:12]}..."
