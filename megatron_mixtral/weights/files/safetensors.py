"""The files of a Hugging Face directory as memory-mapped tensors: safetensors, and the older `pytorch_model.bin`.

Format of safetensors: 8 bytes little-endian length, a JSON header of that length, and the data, which the tensors'
offsets must tile without gap or overlap.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.dtypes import FLOATS
from megatron_mixtral.weights.files.mapped import MappedFile
from megatron_mixtral.weights.files.torch_zip import Stored, load
from megatron_mixtral.weights.rules import Shape

MOST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
KINDS = {kind.safetensors: kind for kind in FLOATS.values()}
OTHER_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "I32": 4,
               "U32": 4, "I64": 8, "U64": 8}


class TensorFile:
    """One safetensors file. Raises `CheckpointError` for one that is not whole and consistent."""

    def __init__(self, path: Path) -> None:
        self.path, self.map = path, MappedFile(path)
        try:
            self._entries, self._start = self._header()
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None

    def _header(self) -> tuple[dict[str, Any], int]:
        length = int.from_bytes(self.map.bytes[:8], "little")
        if len(self.map) < 8 or length > min(MOST_HEADER, len(self.map) - 8):
            raise ValueError(f"its header should have {length} bytes, the file has {len(self.map)}")
        entries = json.loads(self.map.bytes[8:8 + length], object_pairs_hook=_unique)
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
        if at != len(self.map) - 8 - length:
            raise ValueError(f"it should have {at} bytes of data, it has {len(self.map) - 8 - length}")
        return entries, 8 + length

    def names(self) -> list[str]:
        """Every tensor in it."""
        return list(self._entries)

    def shape(self, name: str) -> Shape:
        """A tensor's shape. Raises `CheckpointError` for one of another kind than weights have."""
        self.dtype(name)
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> str:
        """The name of a tensor's type. Raises as `shape`."""
        kind = self._entries[name]["dtype"]
        if kind not in KINDS:
            raise CheckpointError(f"{self.path}: {name} has type {kind}, expected one of {', '.join(KINDS)} (quantized "
                                  "weights cannot be converted)")
        return KINDS[kind].name

    def array(self, name: str) -> numpy.ndarray:
        """A tensor's bit patterns where they lie."""
        return self.map.array(FLOATS[self.dtype(name)].carrier, self.shape(name),
                              self._start + self._entries[name]["data_offsets"][0])


class TorchFile:
    """One `pytorch_model.bin`: a dictionary of tensors saved by torch. Nothing in it runs."""

    def __init__(self, path: Path) -> None:
        self.path, self.map = path, MappedFile(path)
        contents = load(self.map, str(path))
        if not isinstance(contents, dict) or not all(isinstance(name, str) for name in contents):
            raise CheckpointError(f"{path}: expected a dictionary of tensors")
        self._tensors: dict[str, Any] = dict(contents)

    def names(self) -> list[str]:
        """Every tensor in it."""
        return list(self._tensors)

    def _stored(self, name: str) -> Stored:
        found = self._tensors[name]
        if not isinstance(found, Stored) or found.data is None:
            raise CheckpointError(f"{self.path}: {name} is {getattr(found, 'dtype', type(found).__name__)}, expected "
                                  f"floating point weights")
        return found

    def shape(self, name: str) -> Shape:
        """A tensor's shape."""
        return self._stored(name).shape

    def dtype(self, name: str) -> str:
        """The name of a tensor's type."""
        return self._stored(name).dtype

    def array(self, name: str) -> numpy.ndarray:
        """A tensor's bit patterns where they lie."""
        return self._stored(name).data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys must differ."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names a tensor twice")
    return found
