"""`torch.save` archives that lie inside a larger file."""

import io
import mmap
import struct
import zipfile
from typing import Any

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: signature ... length of name, length of extra field


class Window(io.RawIOBase):
    """A part of a memory-mapped file as a stream."""

    def __init__(self, data: mmap.mmap, offset: int, length: int) -> None:
        super().__init__()
        self.data, self._offset, self._length, self._at = data, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        start = self._offset + self._at
        buffer[:count] = self.data[start:start + count]
        self._at += count
        return count


def data_offset(window: Window, size: int) -> int:
    """Where the `size` bytes of the only storage of a `torch.save` archive begin in it. Raises `ValueError`."""
    with zipfile.ZipFile(window) as archive:
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    if len(entries) != 1:
        raise ValueError(f"holds {len(entries)} storages, expected 1")
    entry = entries[0]
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != size:
        raise ValueError(f"its storage has {entry.file_size} bytes, expected {size}, uncompressed")
    window.seek(entry.header_offset)
    header = window.read(_LOCAL_HEADER.size) or b""
    if len(header) != _LOCAL_HEADER.size:
        raise ValueError("its storage has no header")
    signature, name, extra = _LOCAL_HEADER.unpack(header)
    start = entry.header_offset + _LOCAL_HEADER.size + name + extra
    if signature != b"PK\x03\x04" or start + size > window.seek(0, io.SEEK_END):
        raise ValueError("its storage lies outside of it")
    return start
