"""Planning output files before a byte of them is written: where every tensor goes, and the bytes around them.

A `Container` is a whole file laid out: its size, the place of each tensor and the bytes around it, and a function that
gives the last bytes once the tensors' checksums are known. `torch_archive` lays out what `torch.save` would have
written: an uncompressed zip, storages aligned to 64 bytes. Format: PKWARE's APPNOTE (with zip64 where offsets need it),
and `torch.serialization._save` for the entries.

torch itself checks no CRC when it loads, with or without `mmap=True`; other zip readers do. They are right here: at
several GB/s, of bytes that are in the processor's cache already, they cost little.
"""

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_mixtral.weights.dtypes import FLOATS
from megatron_mixtral.weights.files.pickle_writer import Call, Global, Persistent, dumps
from megatron_mixtral.weights.formats.dist_metadata import Region
from megatron_mixtral.weights.plan import TensorSlice
from megatron_mixtral.weights.rules import Shape

ALIGNMENT = 64
_LOCAL = struct.Struct("<4s5H3I2H")
_DESCRIPTOR = struct.Struct("<4s3I")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_FLAGS = 0x0808  # sizes and CRC follow the data; names are UTF-8
_DATE = (1 << 5) | 1  # 1980-01-01: the same weights give the same file
_MOST32, _MOST16 = 0xFFFFFFFF, 0xFFFF


def _nothing(crc: int) -> bytes:
    return b""


@dataclass(frozen=True)
class Placed:
    """A tensor to be written at byte `offset` of a file, in type `dtype`, and the bytes around it.

    `before` goes directly in front of it, `after` (of its CRC-32) directly behind it, so files are written in order.
    """

    tensor: TensorSlice
    dtype: str
    offset: int
    before: bytes = b""
    after: Callable[[int], bytes] = _nothing

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.tensor.elements * FLOATS[self.dtype].itemsize


@dataclass(frozen=True)
class Copied:
    """Bytes of the source that go to byte `offset` of a file as they are."""

    region: Region
    offset: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.region.length


@dataclass(frozen=True)
class Container:
    """A file laid out: its size, its tensors, and `end`, which gives the bytes from `end_at` on.

    `end` is given the CRC-32 of each tensor in order.
    """

    size: int
    placed: tuple[Placed, ...]
    end_at: int
    end: Callable[[Sequence[int]], bytes]
    copied: tuple[Copied, ...] = ()

    @property
    def moved(self) -> int:
        """Bytes that come from the source."""
        return sum(part.size for part in (*self.placed, *self.copied))


@dataclass(frozen=True)
class _Entry:
    """An entry of an archive. Like torch's, it has its CRC and size behind the data, not in front of it."""

    name: bytes
    header: int  # where its local header begins in the archive
    start: int  # where its data begins
    size: int
    data: bytes | None  # None: a tensor's

    def before(self) -> bytes:
        padding = self.start - self.header - _LOCAL.size - len(self.name)
        head = _LOCAL.pack(b"PK\x03\x04", 20, _FLAGS, 0, 0, _DATE, 0, 0, 0, len(self.name), padding)
        return head + self.name + b"FB" + struct.pack("<H", padding - 4) + b"Z" * (padding - 4)

    def after(self, crc: int) -> bytes:
        return _DESCRIPTOR.pack(b"PK\x07\x08", crc, self.size, self.size)

    def whole(self) -> bytes:
        """All of an entry whose data are known."""
        return self.before() + self.data + self.after(zlib.crc32(self.data))

    def central(self, crc: int) -> bytes:
        far = self.header >= _MOST32
        extra = struct.pack("<HHQ", 1, 8, self.header) if far else b""
        return _CENTRAL.pack(b"PK\x01\x02", 45 if far else 20, 45 if far else 20, _FLAGS, 0, 0, _DATE, crc, self.size,
                             self.size, len(self.name), len(extra), 0, 0, 0, 0,
                             _MOST32 if far else self.header) + self.name + extra


def tensor_reference(key: int, dtype: str, shape: Shape) -> Call:
    """What stands for a tensor in the pickle of an archive: storage `key`, contiguous, of `shape`."""
    count, strides = 1, []
    for size in reversed(shape):
        strides.insert(0, count)
        count *= size
    storage = Persistent(("storage", Global("torch", FLOATS[dtype].storage), str(key), "cpu", count))
    return Call(Global("torch._utils", "_rebuild_tensor_v2"),
                (storage, 0, tuple(shape), tuple(strides), False, Call(Global("collections", "OrderedDict"))))


def torch_archive(contents: Any, tensors: Sequence[tuple[TensorSlice, str]], base: int = 0,
                  label: str = "archive") -> Container:
    """The archive of `contents`, which names its tensors by `tensor_reference(index, ...)`, at byte `base` of a file.

    `tensors` are (slice, dtype) by index; `label` is the folder in the archive, which no reader minds. The container's
    size is that of the archive alone. Raises `ValueError` for a tensor of 4 GiB or more.
    """
    assert base % ALIGNMENT == 0, f"archive at byte {base}"
    at = 0

    def entry(name: str, size: int, data: bytes | None = None) -> _Entry:
        nonlocal at
        if size >= _MOST32:
            raise ValueError(f"{name} has {size} bytes; a tensor of a torch archive must have less than 4 GiB here")
        encoded, header = f"{label}/{name}".encode("ascii"), at
        start = header + _LOCAL.size + len(encoded) + 4
        start += -start % ALIGNMENT
        at = start + size + _DESCRIPTOR.size
        return _Entry(encoded, header, start, size, data)

    pickled = dumps(contents)
    first = [entry("data.pkl", len(pickled), pickled), entry("byteorder", 6, b"little")]
    stored = [entry(f"data/{index}", tensor.elements * FLOATS[dtype].itemsize)
              for index, (tensor, dtype) in enumerate(tensors)]
    last = entry("version", 2, b"3\n")
    start = b"".join(one.whole() for one in first)
    placed = tuple(Placed(tensor, dtype, base + one.start, (b"" if index else start) + one.before(), one.after)
                   for index, ((tensor, dtype), one) in enumerate(zip(tensors, stored, strict=True)))
    directory_at = at

    def end(crcs: Sequence[int]) -> bytes:
        sums = [*(zlib.crc32(one.data) for one in first), *crcs, zlib.crc32(last.data)]
        directory = b"".join(one.central(crc) for one, crc in zip([*first, *stored, last], sums, strict=True))
        return (b"" if stored else start) + last.whole() + directory + _ending(len(sums), directory_at, len(directory))

    end_at = last.header if stored else 0
    return Container(end_at + len(end([0] * len(stored))), placed, base + end_at, end)


def _ending(count: int, start: int, size: int) -> bytes:
    """The end of the central directory, in the 64-bit form too where a number needs it."""
    short = _END.pack(b"PK\x05\x06", 0, 0, min(count, _MOST16), min(count, _MOST16), min(size, _MOST32),
                      min(start, _MOST32), 0)
    if count < _MOST16 and start < _MOST32 and size < _MOST32:
        return short
    long = _END64.pack(b"PK\x06\x06", _END64.size - 12, 45, 45, 0, 0, count, count, size, start)
    return long + _LOCATOR64.pack(b"PK\x06\x07", 0, start + size, 1) + short
