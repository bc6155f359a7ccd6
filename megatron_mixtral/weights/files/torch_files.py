"""Reading what `torch.save` writes, as arrays over the mapped bytes.

An archive, a whole file or a window of a larger one, is an uncompressed zip: `NAME/data.pkl`, the pickled object, and
`NAME/data/KEY`, the bytes of each storage that it refers to. Files of torch before 1.6 (and of
`_use_new_zipfile_serialization=False`) are pickles one behind the other (a magic number, a version, the machine, the
object, the storages' keys), and then each storage, its number of elements in front of it.
Format: `torch.serialization._save` and `_legacy_save`, and `torch._utils._rebuild_tensor_v2`.
"""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.dtypes import FLOATS, OTHER_STORAGES
from megatron_mixtral.weights.files.file_layout import LABEL, contiguous_strides
from megatron_mixtral.weights.files.inert_pickle import UNPICKLING_ERRORS, scan, unpickle
from megatron_mixtral.weights.files.mapped import MappedFile, Reader, Stored

_LOCAL_HEADER = struct.Struct("<4s2xH18xHH")  # of a zip entry: signature, flags, ... length of name and of extra field
_ZIP, _DESCRIPTOR, _DESCRIBED = b"PK\x03\x04", b"PK\x07\x08", 8  # flag: size and CRC are behind the data
_STREAM = pickle.dumps(0x1950A86A20F9469CFC6C, 2)  # the magic number
STREAM_VERSION = 1001
FIRST = 1 << 20  # bytes in which the pickles of a stream are looked for first
MOST_PICKLE = 1 << 28  # bytes of data.pkl; a checkpoint's has a few hundred thousand
MOST_ORDER = 16  # bytes of byteorder: "little" or "big"
STORAGES = {kind.storage: kind for kind in FLOATS.values()}
ITEM_SIZES = {name: kind.itemsize for name, kind in STORAGES.items()} | OTHER_STORAGES


class _Window:
    """A part of a file as a stream, for `zipfile`."""

    def __init__(self, reader: Reader, file: MappedFile, offset: int, length: int) -> None:
        self.reader, self.file, self.offset, self.length, self._at = reader, file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.length}[whence])
        return self._at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.length - self._at)
        start, self._at = self._at, self._at + (left if count < 0 else min(count, left))
        return self.reader.read(self.file, self.offset + start, self._at - start)


class _Storage:
    """What a persistent id names: the type and the number of elements of one storage."""

    def __init__(self, pid: Any) -> None:
        kind, self.type, self.key, _, self.count, *part = pid
        if part not in ([], [None]):
            raise ValueError("has a storage within another, as torch before 0.4 wrote it; save the model again with a "
                             "newer torch")
        if kind != "storage" or not isinstance(self.type, str) or not isinstance(self.count, int) or self.count < 0:
            raise ValueError("refers to something that is no storage")


class _Archive:
    def __init__(self, reader: Reader, file: MappedFile, offset: int, length: int) -> None:
        self.reader, self.file, self.base = reader, file, offset
        with zipfile.ZipFile(_Window(reader, file, offset, length)) as archive:
            self.entries = {entry.filename: entry for entry in archive.infolist()}
            # Where each entry ends at the latest: nothing lies between entries.
            self.ends = sorted([*(entry.header_offset for entry in archive.infolist()), archive.start_dir])
            if self.ends[0] != 0:
                raise ValueError(f"its first entry is at byte {self.ends[0]} of it")
            if len(self.entries) != len(archive.infolist()):
                raise ValueError("has two entries of one name")
            pickles = [name for name in self.entries if name.endswith("/data.pkl")]
            if len(pickles) != 1 or self.entries[pickles[0]].file_size > MOST_PICKLE:
                raise ValueError("has no data.pkl")
            self.pickle, self.label = archive.read(pickles[0]), pickles[0].removesuffix("/data.pkl")
            order = f"{self.label}/byteorder"
            if order in self.entries and (self.entries[order].file_size > MOST_ORDER
                                          or archive.read(order) != b"little"):
                raise ValueError("its byteorder is not little: of a big-endian machine, or damaged")

    def storage_offset(self, storage: _Storage, itemsize: int) -> int:
        """Where a storage's bytes begin in the file. Raises `ValueError`."""
        entry = self.entries.get(f"{self.label}/data/{storage.key}")
        if entry is None:
            raise ValueError(f"has no storage {storage.key}")
        size = storage.count * itemsize
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != size:
            raise ValueError(f"its storage {storage.key} has {entry.file_size} bytes, expected {size}, uncompressed")
        read, named = partial(self.reader.read, self.file), self.base + entry.header_offset + _LOCAL_HEADER.size
        header = read(named - _LOCAL_HEADER.size, _LOCAL_HEADER.size)
        if len(header) != _LOCAL_HEADER.size:
            raise ValueError(f"its storage {storage.key} has no header")
        signature, flags, name, extra = _LOCAL_HEADER.unpack(header)
        same = read(named, name) == entry.orig_filename.encode("utf-8")
        start = named + name + extra
        end = start + size
        # The header is not under any checksum, and a wrong length in it would move the data.
        described = read(end, len(_DESCRIPTOR)) == _DESCRIPTOR
        ends = described if flags & _DESCRIBED else end - self.base in self.ends
        if signature != _ZIP or not same or not ends:
            raise ValueError(f"its storage {storage.key} lies elsewhere than its header says")
        self.file.sums.expect(start, size, entry.CRC, f"storage {storage.key} of {self.label}")
        return start

    def load(self, where: str) -> Any:
        return _load(self.pickle, where, self.file, self.storage_offset)


class _Stream:
    """A file of the older form."""

    def __init__(self, reader: Reader, file: MappedFile) -> None:
        self.file, size = file, min(len(file.bytes), MOST_PICKLE)
        data = reader.read(file, 0, min(FIRST, size))
        while True:
            try:
                at = [0]
                for _ in range(5):
                    at.append(scan(data, at[-1]))
                break
            except EOFError:
                if len(data) == size:
                    raise
                data = reader.read(file, 0, min(4 * len(data), size))
        magic, version, machine, self.pickle, keys = (data[start:end] for start, end in pairwise(at))
        head = [unpickle(one, str(file.path)) for one in (magic, version, machine, keys)]
        if head[1] != STREAM_VERSION or not head[2].get("little_endian"):
            raise ValueError(f"it is of version {head[1]}, little endian: {head[2].get('little_endian')}")
        found: dict[str, _Storage] = {}

        def note(pid: Any) -> _Storage:
            one = _Storage(pid)
            same = found.setdefault(one.key, one)
            if (one.type, one.count) != (same.type, same.count):
                raise ValueError(f"says two things of its storage {one.key}")
            return one

        unpickle(self.pickle, str(file.path), _known(lambda *_: None), note)
        if sorted(found) != sorted(head[3]):
            raise ValueError("its list of storages is not that of its tensors")
        self.starts, begin = dict[str, int](), at[-1]
        for key in head[3]:
            if int.from_bytes(reader.read(file, begin, 8), "little") != found[key].count:
                raise ValueError(f"its storage {key} has not the {found[key].count} elements that its tensor has")
            self.starts[key] = begin + 8
            begin += 8 + found[key].count * ITEM_SIZES[found[key].type]
        if begin != len(file.bytes):
            raise ValueError(f"it should have {begin} bytes, it has {len(file.bytes)}")

    def load(self, where: str) -> Any:
        return _load(self.pickle, where, self.file, lambda storage, _: self.starts[storage.key], True)


def _load(pickled: bytes, where: str, file: MappedFile, locate: Callable[[_Storage, int], int],
          whole: bool = False) -> Any:
    """The object of a pickle; `locate` says at which byte of the file a storage of items of a size begins.

    `whole` refuses tensors that are not all of their storage, in its order: in a file without a checksum that may be
    a bit that flipped.
    """

    def rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Stored:
        """`torch._utils._rebuild_tensor_v2`."""
        if not isinstance(storage, _Storage) or not isinstance(offset, int) or offset < 0:
            raise ValueError("has a tensor without a storage")
        shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
        kind = STORAGES.get(storage.type)
        if kind is None:
            return Stored(None, storage.type.removesuffix("Storage").lower(), shape)
        if min((*shape, *strides, 0)) < 0 or len(shape) != len(strides):
            raise ValueError("has a tensor of a negative shape")
        if whole and (offset, prod(shape), strides) != (0, storage.count, contiguous_strides(shape)):
            raise ValueError(f"a tensor of {shape} is not all of its storage, in its order; save the model again with "
                             "a newer torch, which adds checksums")
        reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if prod(shape) else 0
        if offset + reach > storage.count:
            raise ValueError(f"a tensor of {shape} does not fit its storage of {storage.count} elements")
        start = locate(storage, kind.itemsize) + offset * kind.itemsize
        return Stored(file.array(kind.carrier, shape, start, strides if prod(shape) else None), kind.name, shape)

    return unpickle(pickled, where, _known(rebuild), _Storage)


def _known(rebuild: Callable[..., Any]) -> dict[tuple[str, str], Any]:
    """The globals of torch that have a meaning here."""
    known: dict[tuple[str, str], Any] = {
        ("torch._utils", "_rebuild_tensor_v2"): rebuild, ("torch._utils", "_rebuild_tensor"): rebuild,
        ("torch._utils", "_rebuild_parameter"): lambda data, *_: data}
    for name in ITEM_SIZES:
        known["torch", name] = known["torch.storage", name] = name
    return known


def load_torch(file: MappedFile, where: str, offset: int = 0, length: int | None = None,
               label: str | None = None) -> Any:
    """The object of the archive in bytes [offset, offset + length) of a file, its tensors as `Stored`.

    With `label`, an archive that is labelled (`LABEL`) must be labelled so.
    Raises `CheckpointError` that begins with `where`.
    """
    length = len(file.bytes) - offset if length is None else length
    try:
        with Reader() as reader:
            start = reader.read(file, offset, len(_STREAM))
            if start == _STREAM and not offset:
                return _Stream(reader, file).load(where)
            if not start.startswith(_ZIP):
                raise ValueError("it does not begin as an archive")
            archive = _Archive(reader, file, offset, length)
            if label is not None and LABEL in archive.label and archive.label != label:
                raise ValueError(f"it holds {archive.label}, expected {label}; were files swapped?")
            return archive.load(where)
    except (zipfile.BadZipFile, NotImplementedError, struct.error, *UNPICKLING_ERRORS) as error:
        text = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{where} is not a whole torch file: {text}") from None
