"""CRC-32s of storages that are read in parts: what was read has to be what was saved.

An archive of torch's notes a sum of each storage, and `torch.load` looks at none of them, so a bit that a disk or a
copy has flipped becomes a weight. Here threads sum up what they read, in any order, and the sums of neighbours are
joined.
"""

import threading
from bisect import bisect_left
from collections.abc import Buffer, Callable, Iterable

from megatron_mixtral.errors import CheckpointError

try:  # with the processor's own instructions: as fast as memory, where zlib's takes a third of a conversion's time
    from isal.isal_zlib import crc32, crc32_combine
except ImportError:
    from zlib import crc32

    crc32_combine = None  # zlib has one, but Python 3.12 does not show it

Sum = Callable[[int, int], int]  # (offset, length) to the CRC-32 of these bytes, which are read for it


def checksum(blocks: Iterable[Buffer]) -> int:
    """CRC-32 of bytes in blocks."""
    crc = 0
    for block in blocks:
        crc = crc32(block, crc)
    return crc


class Sums:
    """Of one file. Offsets and lengths are in bytes of the file."""

    def __init__(self) -> None:
        self._saved: dict[int, tuple[int, int, str]] = {}  # by offset: length, CRC, and what lies there
        self._read: dict[int, tuple[int, int]] = {}  # by offset: length, CRC
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        """Whether there is anything to compare with."""
        return bool(self._saved)

    def expect(self, offset: int, length: int, crc: int, what: str) -> None:
        """What was noted when these bytes were saved. 0 is that of nothing, or of a writer that made no sums
        (`torch.serialization.set_crc32_options(False)`).
        """
        if crc:
            self._saved[offset] = (length, crc, what)

    def note(self, offset: int, length: int, crc: int) -> None:
        """These bytes were read, and this is their sum. A length of 0: there was read, but nothing summed."""
        with self._lock:
            self._read[offset] = max(self._read.get(offset, (0, 0)), (length, crc))

    def check(self, where: str, read: Sum | None) -> None:
        """Compare every storage of which something was read, and forget all. Raises `CheckpointError` for one that is
        not as it was saved. What nobody has summed, `read` reads; None: storages with such parts are not looked at.
        """
        parts = sorted(self._read.items())
        for start, (length, crc, what) in self._saved.items():
            own = parts[bisect_left(parts, (start,)):bisect_left(parts, (start + length,))]
            if not own:
                continue
            found = self._joined(start, start + length, own, read)
            if found is not None and found != crc:
                raise CheckpointError(
                    f"{where}: {what} is not what was saved (bytes {start} to {start + length} have the CRC-32 "
                    f"{found:08x}, the file says {crc:08x}): a disk or a copy has damaged it. Take another copy of it")
        self._saved, self._read = {}, {}

    @staticmethod
    def _joined(start: int, end: int, parts: list[tuple[int, tuple[int, int]]], read: Sum | None) -> int | None:
        """The sum of bytes [start, end) from those of their parts."""
        found, at, missing = 0, start, []
        for offset, (length, _) in [*parts, (end, (0, 0))]:
            missing += [(at, offset - at)] * (offset > at)
            overlaps, at = offset < at, max(at, offset + length)
            if overlaps or at > end or crc32_combine is None:
                return None if read is None else read(start, end - start)
        if missing and read is None:
            return None
        whole = [*((offset, length, crc) for offset, (length, crc) in parts if length),
                 *((offset, length, read(offset, length)) for offset, length in missing)]
        for _, length, crc in sorted(whole):
            found = crc32_combine(found, crc, length)
        return found
