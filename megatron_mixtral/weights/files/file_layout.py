"""Planning output files before a byte of them is written: where everything goes, and the bytes around it.

A `FileLayout` is a whole file laid out: its size, the place of each payload and the bytes around it, and a function
that gives the last bytes once the payloads' checksums are known. `torch_archive` lays out what `torch.save` would have
written: an uncompressed zip, storages aligned to 64 bytes. Format: PKWARE's APPNOTE (with zip64 where offsets need it),
and `torch.serialization._save` for the entries.

torch itself checks no CRC when it loads, with or without `mmap=True`; other zip readers do, and `sums` here.
"""

import struct
from collections.abc import Buffer, Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from megatron_mixtral.weights.dtypes import FLOATS
from megatron_mixtral.weights.files.mapped import Region
from megatron_mixtral.weights.files.pickle_writer import Call, Global, Persistent, dumps
from megatron_mixtral.weights.files.sums import checksum as checksum
from megatron_mixtral.weights.files.sums import crc32

ALIGNMENT = 64
LABEL = "@"  # in the name of an archive's folder: NAME@OFFSETS
_LOCAL = struct.Struct("<4s5H3I2H")
_DESCRIPTOR = struct.Struct("<4s3I")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_FLAGS = 0x0808  # sizes and CRC follow the data; names are UTF-8
_DATE = (1 << 5) | 1  # 1980-01-01: the same weights give the same file
_MOST32, _MOST16 = 0xFFFFFFFF, 0xFFFF


@dataclass(frozen=True)
class Payload:
    """What a file is to hold. Planning needs its size; `blocks` gives the bytes, in order, when it is written.

    `blocks` is given a list of parts and yields, step by step, the next bytes of each of them: this payload is `part`,
    and those of payloads with the same `key` (None: of no other) can be had in the same pass over the source.
    A tensor has a `dtype` (of `FLOATS`) and a shape; anything else is bytes that are copied as they are.
    """

    name: str
    size: int  # bytes
    blocks: Callable[[Sequence[Hashable]], Iterable[Sequence[Buffer]]]
    dtype: str | None = None
    shape: tuple[int, ...] = ()
    key: Hashable = None
    part: Hashable = None


@dataclass(frozen=True)
class Placed:
    """A payload to be written at byte `offset` of a file, and the bytes around it.

    `before` goes directly in front of it, `after` (of its CRC-32) directly behind it. Where nothing needs the CRC-32
    (`summed` is false) it is not computed, and 0.
    """

    payload: Payload
    offset: int
    before: bytes = b""
    after: Callable[[int], bytes] = lambda crc: b""
    summed: bool = False


@dataclass(frozen=True)
class FileLayout:
    """A file laid out: its size, what is in it, and `end`, which gives the bytes from `end_at` on.

    `end` is given the CRC-32 of each payload in order.
    """

    size: int
    placed: tuple[Placed, ...]
    end_at: int = 0
    end: Callable[[Sequence[int]], bytes] = lambda crcs: b""

    @property
    def moved(self) -> int:
        return sum(placed.payload.size for placed in self.placed)

    @property
    def tensors(self) -> int:
        return sum(placed.payload.dtype is not None for placed in self.placed)


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
        return self.before() + self.data + self.after(crc32(self.data))

    def central(self, crc: int) -> bytes:
        far = self.header >= _MOST32
        extra = struct.pack("<HHQ", 1, 8, self.header) if far else b""
        return _CENTRAL.pack(b"PK\x01\x02", 45 if far else 20, 45 if far else 20, _FLAGS, 0, 0, _DATE, crc, self.size,
                             self.size, len(self.name), len(extra), 0, 0, 0, 0,
                             _MOST32 if far else self.header) + self.name + extra


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Steps, in elements, of each dim of a tensor that lies in order. Where a dim is 0 torch counts it as 1."""
    return tuple(prod(max(1, size) for size in shape[dim + 1:]) for dim in range(len(shape)))


def _reference(key: int, tensor: Payload) -> Call:
    """What stands for a tensor in the pickle of an archive: storage `key`, contiguous, of the tensor's shape."""
    storage = Persistent(("storage", Global("torch", FLOATS[tensor.dtype].storage), str(key), "cpu",
                          prod(tensor.shape)))
    return Call(Global("torch._utils", "_rebuild_tensor_v2"),
                (storage, 0, tensor.shape, contiguous_strides(tensor.shape), False,
                 Call(Global("collections", "OrderedDict"))))


def _referred(value: Any, found: list[Payload]) -> Any:
    """`value` with every tensor in its dictionaries and lists replaced by a reference, and noted in `found`."""
    if isinstance(value, Payload):
        found.append(value)
        return _reference(len(found) - 1, value)
    if isinstance(value, dict):
        return {key: _referred(item, found) for key, item in value.items()}
    return [_referred(item, found) for item in value] if isinstance(value, list) else value


def torch_archive(contents: Any, base: int = 0, label: str = "archive") -> FileLayout:
    """The archive of `contents`, a value whose tensors are `Payload`s, at byte `base` of a file.

    `label` is the folder in the archive, which no reader minds. The layout's size is that of the archive alone.
    Without tensors it has an empty payload. Raises `ValueError` for a tensor of 4 GiB or more.
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

    tensors: list[Payload] = []
    pickled = dumps(_referred(contents, tensors))
    first = [entry("data.pkl", len(pickled), pickled), entry("byteorder", 6, b"little")]
    stored = [entry(f"data/{index}", tensor.size) for index, tensor in enumerate(tensors)]
    last = entry("version", 2, b"3\n")
    start = b"".join(one.whole() for one in first)
    placed = [Placed(tensor, base + one.start, (b"" if index else start) + one.before(), one.after, True)
              for index, (tensor, one) in enumerate(zip(tensors, stored, strict=True))]
    if not placed:
        placed = [Placed(Payload(label, 0, lambda parts: ()), base + last.header, start)]
    directory_at = at

    def end(crcs: Sequence[int]) -> bytes:
        sums = [*(crc32(one.data) for one in first), *crcs[:len(stored)], crc32(last.data)]
        directory = b"".join(one.central(crc) for one, crc in zip([*first, *stored, last], sums, strict=True))
        return last.whole() + directory + _ending(len(sums), directory_at, len(directory))

    return FileLayout(last.header + len(end([0] * len(stored))), tuple(placed), base + last.header, end)


class Joined:
    """A file of archives of one tensor or none, and of copied ones, each behind the other on a multiple of 64 bytes."""

    def __init__(self, path: Path) -> None:
        self._path, self._size = path, 0
        self._placed: list[Placed] = []

    def archive(self, contents: Any, label: str) -> Region:
        """Add the archive of `contents`; returns where it will be."""
        at = self._next()
        part = torch_archive(contents, at, label)
        (placed,) = part.placed
        self._placed.append(replace(placed, after=partial(_seal, placed, part)))
        self._size = at + part.size
        return Region(self._path, at, part.size)

    def copy(self, name: str, region: Region) -> Region:
        """Add an archive of another file as it is; returns where it will be."""
        at = self._next()
        self._placed.append(Placed(Payload(name, region.length, lambda parts: ([one] for one in region.blocks())), at))
        self._size = at + region.length + -region.length % ALIGNMENT
        return Region(self._path, at, region.length)

    def _next(self) -> int:
        return self._size + -self._size % ALIGNMENT

    def layout(self) -> FileLayout:
        return FileLayout(self._size, tuple(self._placed))


def _seal(placed: Placed, archive: FileLayout, crc: int) -> bytes:
    """What follows the only tensor of an archive, or the place of none."""
    return placed.after(crc) + archive.end([crc])


def label_of(name: str, offsets: tuple[int, ...]) -> str:
    """What we call the archive of a part of a tensor, so that a reader notices one in the wrong place."""
    return f"{name.replace('/', '.')}{LABEL}{'.'.join(map(str, offsets))}"


def _ending(count: int, start: int, size: int) -> bytes:
    """The end of the central directory, in the 64-bit form too where a number needs it."""
    short = _END.pack(b"PK\x05\x06", 0, 0, min(count, _MOST16), min(count, _MOST16), min(size, _MOST32),
                      min(start, _MOST32), 0)
    if count < _MOST16 and start < _MOST32 and size < _MOST32:
        return short
    long = _END64.pack(b"PK\x06\x06", _END64.size - 12, 45, 45, 0, 0, count, count, size, start)
    return long + _LOCATOR64.pack(b"PK\x06\x07", 0, start + size, 1) + short
