"""TCP ports of this machine that no two test processes take at once.

A port that the kernel chose is free when it is asked for and may be another's when it is used: two files of tests run
at a time, and each outgoing connection takes one. So each process holds a block of ports, below those that the kernel
gives out (/proc/sys/net/ipv4/ip_local_port_range: from 32768), and uses them in turn.
"""

import fcntl
import itertools
import socket
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

FIRST, BLOCKS, SIZE = 12288, 80, 256  # up to 32767


@cache
def _block() -> Iterator[int]:
    """The ports of a block that is ours while this process lives, over and over."""
    for block in range(BLOCKS):
        lock = (Path(tempfile.gettempdir()) / f"megatron_mixtral_test_ports_{block}").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        _held.append(lock)
        return itertools.cycle(range(FIRST + block * SIZE, FIRST + (block + 1) * SIZE))
    raise AssertionError(f"{BLOCKS} processes of tests hold all blocks of ports")


_held: list[object] = []  # closing a file would free its lock


def free_port() -> int:
    """A port on which nothing listens, the next of this process's block."""
    for port in itertools.islice(_block(), SIZE):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a store does
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("all ports of the block are in use")
