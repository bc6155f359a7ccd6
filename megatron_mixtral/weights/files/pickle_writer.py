"""Writing pickles that name classes of torch without having torch: the opposite of `inert_pickle`.

Python's own pickler wants to import what it names. The few instructions that checkpoints need are written here
directly, in protocol 2, which is what `torch.save` uses and `torch.load(weights_only=True)` understands.
Format: the standard library's `pickletools`.
"""

import argparse
import struct
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Global:
    """Something that the reader imports: `module.name`."""

    module: str
    name: str


@dataclass(frozen=True, eq=False)  # so that it can be a dictionary's key
class Call:
    """`function(*arguments)`, then with `state` given its `__setstate__` (or `__dict__.update`)."""

    function: Global
    arguments: tuple[Any, ...] = ()
    state: Any = None
    new: bool = False  # function.__new__(function, *arguments), as for plain objects


@dataclass(frozen=True)
class Persistent:
    """An object that the reader finds by an id."""

    pid: Any


def dumps(value: Any) -> bytes:
    """The pickle of plain values, tuples, lists, dictionaries, `argparse.Namespace` and the classes above."""
    out = bytearray(b"\x80\x02")
    _save(out, value)
    return bytes(out + b".")


def _save(out: bytearray, value: Any) -> None:
    if value is None:
        out += b"N"
    elif value is True or value is False:
        out += b"\x88" if value else b"\x89"
    elif isinstance(value, int):
        _save_int(out, value)
    elif isinstance(value, float):
        out += b"G" + struct.pack(">d", value)
    elif isinstance(value, str):
        encoded = value.encode("utf-8")
        out += b"X" + struct.pack("<I", len(encoded)) + encoded
    elif isinstance(value, tuple):
        out += b"("
        for item in value:
            _save(out, item)
        out += b"t"
    elif isinstance(value, list):
        out += b"]("
        for item in value:
            _save(out, item)
        out += b"e"
    elif isinstance(value, dict):
        out += b"}("
        for key, item in value.items():
            _save(out, key)
            _save(out, item)
        out += b"u"
    else:
        _save_object(out, value)


def _save_int(out: bytearray, value: int) -> None:
    if -2**31 <= value < 2**31:
        out += b"J" + struct.pack("<i", value)
        return
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    out += b"\x8a" + struct.pack("<B", len(encoded)) + encoded


def _save_object(out: bytearray, value: Any) -> None:
    if isinstance(value, Global):
        out += f"c{value.module}\n{value.name}\n".encode("ascii")
    elif isinstance(value, Persistent):
        _save(out, value.pid)
        out += b"Q"
    elif isinstance(value, Call):
        _save(out, value.function)
        _save(out, value.arguments)
        out += b"\x81" if value.new else b"R"
        if value.state is not None:
            _save(out, value.state)
            out += b"b"
    elif isinstance(value, argparse.Namespace):
        _save(out, Call(Global("argparse", "Namespace"), (), vars(value), new=True))
    else:
        raise TypeError(f"no pickle for {type(value).__name__}")
