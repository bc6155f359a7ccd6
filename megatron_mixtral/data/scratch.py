"""The hidden directory beside an output in which a preprocessing run keeps its unfinished files."""

import errno
import fcntl
import logging
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_mixtral import disk
from megatron_mixtral.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)  # errors of a disk, or of a share of it, that is full


@contextmanager
def scratch_directory(prefix: str, needed: int = 0, anew: bool = False) -> Iterator[Path]:
    """A hidden directory beside the output, locked. It is removed at the end, but for a run that ended early and has
    finished parts: the next run of this prefix takes these up. With `anew` nothing is kept and nothing taken up.

    Raises `ConfigError` when another run is writing to the same prefix, or the place cannot be written, and `DataError`
    when its disk becomes full; `needed` is about how many bytes the run needs there.
    """
    target = Path(prefix)
    path = target.parent / f".{target.name}.preprocess"
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / "lock", "w", encoding="ascii")
    except OSError as error:
        raise ConfigError(f"--output-prefix {prefix}: cannot write in {target.parent}: {error}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"--output-prefix {prefix}: another run is writing there at this moment.") from error
        except OSError as error:  # a file system without locks: go on without this protection
            logger.warning("%s cannot be locked (%s): make sure that no other run uses this prefix", path, error)
        if anew:
            clear(path)
        try:
            yield path
        except BaseException as error:
            free = disk.human_size(disk.free_space(path))  # before anything of this run goes
            if not anew and (any(path.glob("part-*.ids")) or any(path.glob("*.bin.tmp"))):
                logger.warning(
                    "%s keeps what is finished: the same command goes on from there; without it, begin anew", path
                )
            else:
                shutil.rmtree(path, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in FULL:
                raise DataError(
                    f"--output-prefix {prefix}: the disk of {target.parent} is full: {free} free, about "
                    f"{disk.human_size(needed)} needed in all. Make room there, or give another prefix."
                ) from error
            raise
        shutil.rmtree(path, ignore_errors=True)


def checksum(stream: BinaryIO, size: int) -> int:
    """CRC-32 of the next `size` bytes."""
    found = 0
    while size and (block := stream.read(min(size, 1 << 20))):
        found = zlib.crc32(block, found)
        size -= len(block)
    return found


def clear(scratch: Path) -> None:
    """Empty a scratch directory, but for its lock."""
    for left in scratch.iterdir():
        if left.name != "lock":
            shutil.rmtree(left) if left.is_dir() else left.unlink()
