"""safetensors files: read as memory-mapped tensors, and laid out to be written.

Format: 8 bytes little-endian length, a JSON header of that length, and the data, which the tensors' offsets must tile
without gap or overlap.
"""

import json
import struct
from collections.abc import Iterable
from math import prod
from typing import Any

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.dtypes import FLOATS
from megatron_mixtral.weights.files.file_layout import FileLayout, Payload, Placed
from megatron_mixtral.weights.files.mapped import MappedFile, Reader, Stored

MOST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
KINDS = {kind.safetensors: kind for kind in FLOATS.values()}
OTHER_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "I32": 4,
               "U32": 4, "I64": 8, "U64": 8}


def load_safetensors(file: MappedFile) -> dict[str, Stored]:
    """The tensors of a file by name. Raises `CheckpointError` for one that is not whole and consistent."""
    try:
        entries, start = _header(file)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{file.path} is not a whole safetensors file: {error}") from None
    found = {}
    for name, entry in entries.items():
        kind, shape = KINDS.get(entry["dtype"]), tuple(entry["shape"])
        data = None if kind is None else file.array(kind.carrier, shape, start + entry["data_offsets"][0])
        found[name] = Stored(data, entry["dtype"] if kind is None else kind.name, shape)
    return found


def _header(file: MappedFile) -> tuple[dict[str, Any], int]:
    """The entries of a header, checked, and where the data begin. Raises `ValueError` and what a wrong type raises."""
    with Reader() as reader:
        length = int.from_bytes(reader.read(file, 0, 8), "little")
        if len(file.bytes) < 8 or length > min(MOST_HEADER, len(file.bytes) - 8):
            raise ValueError(f"its header should have {length} bytes, the file has {len(file.bytes)}")
        entries = json.loads(reader.read(file, 8, length), object_pairs_hook=_unique)
    if not isinstance(entries, dict):
        raise ValueError("its header is not a JSON object")
    entries.pop("__metadata__", None)
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (*item[1]["data_offsets"], item[0])):
        begin, end = entry["data_offsets"]
        shape, kind = entry["shape"], entry["dtype"]
        size = KINDS[kind].itemsize if kind in KINDS else OTHER_SIZES.get(kind)
        if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
            raise ValueError(f"{name} has shape {shape} at {begin} to {end}")
        if begin != at or (size is not None and end - begin != prod(shape) * size):
            raise ValueError(f"{name} of {kind} {shape} should begin at {at} and not lie at {begin} to {end}")
        at = end
    if at != len(file.bytes) - 8 - length:
        raise ValueError(f"it should have {at} bytes of data, it has {len(file.bytes) - 8 - length}")
    return entries, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys must differ."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names a tensor twice")
    return found


def lay_out(tensors: Iterable[Payload]) -> FileLayout:
    """A file of these tensors: the header, and each tensor behind the one before."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, at = [], 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": FLOATS[tensor.dtype].safetensors, "shape": list(tensor.shape),
                               "data_offsets": [at, at + tensor.size]}
        places.append((tensor, at))
        at += tensor.size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data must start at a multiple of 8
    head = struct.pack("<Q", len(encoded)) + encoded
    return FileLayout(len(head) + at, tuple(Placed(tensor, len(head) + start, b"" if start else head)
                                            for tensor, start in places))
