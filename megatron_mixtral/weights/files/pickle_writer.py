"""Writing pickles that name classes of torch without having torch: the opposite of `inert_pickle`.

Python's own pickler wants to import what it names. The few instructions that checkpoints need are written here
directly, in protocol 2, which is what `torch.save` uses and `torch.load(weights_only=True)` understands.
Format: the standard library's `pickletools`.
"""

import argparse
import struct
from dataclasses import dataclass
from itertools import chain
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
    return b"\x80\x02" + _saved(value) + b"."


def _saved(*values: Any) -> bytes:
    """The instructions that put these values on the reader's stack, in order."""
    return b"".join(map(_one, values))


def _one(value: Any) -> bytes:
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int() if -2**31 <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        case int():
            encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + struct.pack("<B", len(encoded)) + encoded
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            encoded = value.encode("utf-8")
            return b"X" + struct.pack("<I", len(encoded)) + encoded
        case tuple():
            return b"(" + _saved(*value) + b"t"
        case list():
            return b"](" + _saved(*value) + b"e"
        case dict():
            return b"}(" + _saved(*chain.from_iterable(value.items())) + b"u"
        case Global():
            return f"c{value.module}\n{value.name}\n".encode("ascii")
        case Persistent():
            return _saved(value.pid) + b"Q"
        case Call():
            made = _saved(value.function, value.arguments) + (b"\x81" if value.new else b"R")
            return made if value.state is None else made + _saved(value.state) + b"b"
        case argparse.Namespace():
            return _saved(Call(Global("argparse", "Namespace"), (), vars(value), new=True))
    raise TypeError(f"no pickle for {type(value).__name__}")
