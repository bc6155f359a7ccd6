"""Files that are whole or not there, and what a disk has left. Standard library only; every room writes through it.

A file or directory is written under a temporary name beside its place, flushed to the disk, and renamed: a reader, and
a run after a crash, finds the old one or the new one.
"""

import os
import shutil
import tempfile
from pathlib import Path

# What a download leaves in the place of a file, by how it begins, and the cure: nothing that is read here begins so.
_PAGE = "is a web page (of a log-in or an error?), not the file itself; download it again"
_PLACEHOLDERS = {
    b"version https://git-lfs": "is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder",
    b"<!doctype html": _PAGE, b"<html": _PAGE,
}
START = 64  # bytes of a file that tell


def placeholder(start: bytes) -> str | None:
    """What a file is that begins so, where a download left it in another's place, and what to do; else None."""
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((cure for sign, cure in _PLACEHOLDERS.items() if start.startswith(sign)), None)


def sync(path: str | Path) -> None:
    """Flush one file, or the names in one directory, to the disk. Raises `OSError`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: str | Path) -> None:
    """`sync` every file and directory below `directory`, itself last. Raises `OSError`."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync(Path(folder) / name)
        sync(folder)


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file as UTF-8 so that under its name it is whole, even after a crash. Raises `OSError`."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with draft.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    sync(path.parent)


def existing_parent(path: str | Path) -> Path:
    """The nearest directory at or above `path` that exists: the one whose disk `path` will be on."""
    folder = Path(os.path.abspath(path))
    while not folder.exists():
        folder = folder.parent
    return folder


def try_writing(folder: str | Path) -> None:
    """Raises `OSError` where a directory, or the one in which it would be made, takes no file. It is tried, since
    permissions do not tell (a file system that is read-only, another user of an NFS). Leaves nothing behind.
    """
    with tempfile.TemporaryFile(dir=existing_parent(folder)):
        pass


def free_space(path: str | Path) -> int:
    """Bytes free on the disk that `path` is on, or will be. Raises `OSError`."""
    return shutil.disk_usage(existing_parent(path)).free


def human_size(count: float) -> str:
    """Bytes in decimal units, as disks are sold: 1536 -> "1.54 kB"."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}" if count < 1000 * factor else f"{count / factor:.0f} {unit}"
    return f"{count:.0f} bytes"
