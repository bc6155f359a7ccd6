"""The sign of life of a run's lease (`lease.py`): the file, and the process beside rank 0 that writes into it.

Run as a program, `heartbeat.py FILE TOKEN PID`, so that it beats through whatever rank 0 does (the engine builds
indexes in C++ for minutes, and no thread runs meanwhile), and gives the lease back however rank 0 ends. Standard
library only, and nothing of the package.

    00000000000000000042        counts up in place: a new file would be seen late by other clients of NFS
    {"token": "...", ...}       whose it is
"""

import errno
import os
import signal
import sys
import time
from contextlib import suppress

EVERY = 2.0  # seconds between two beats
_LOOK = 0.25  # seconds between two looks at the parent
_DIGITS = 20
LEFT = ".left"  # behind the file's name: what remains of a run that was killed, until the next one begins


def create(path: str, whose: str) -> bool:
    """Make the file, unless there is one; whether it was made. Of several at once, one succeeds, on NFS too."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(handle, f"{0:0{_DIGITS}}\n{whose}\n".encode())
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(handle)
    return True


def read(path: str) -> bytes | None:
    """What the file holds; None where there is none, or another one by the next look (a stale handle of NFS)."""
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
        return None


def beat(path: str, token: str, count: int) -> None:
    """Count up, if the file is still that of `token`."""
    with suppress(OSError), open(path, "r+b", buffering=0) as stream:
        if token.encode() in stream.read():
            os.pwrite(stream.fileno(), f"{count:0{_DIGITS}}".encode(), 0)


def remove(path: str, token: str, mover: str, left: bool = False) -> None:
    """Remove the file of `token`, or put it where the `left` ones are. It gets a name of its own first: of several that
    try, one succeeds in that. What then turns out to be another's, made since the last look, is put back.
    """
    aside = f"{path}.{mover}"
    if token.encode() not in (read(path) or b""):
        return
    with suppress(FileNotFoundError):
        os.rename(path, aside)
        if token.encode() not in (read(aside) or b""):
            os.link(aside, path)
        elif left:
            os.replace(aside, path + LEFT)
            return
        os.unlink(aside)


def main(path: str, token: str, parent: int) -> None:
    """Beat until the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the parent, which saves first
    count, due = 0, time.monotonic()
    while os.getppid() == parent:
        if time.monotonic() >= due:
            count, due = count + 1, due + EVERY
            beat(path, token, count)
        time.sleep(_LOOK)
    with suppress(OSError):
        remove(path, token, f"{token}.killed", left=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
