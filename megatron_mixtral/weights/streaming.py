"""Reading weights in the order in which they will be stored: the bytes of a slice, block after block, from a source.

Whole runs stay where they are mapped, so they reach the output (or a checksum) without another copy; columns are
gathered in a small buffer. Sinks plan with `payload`, and `files.writer` writes the blocks. `assemble` makes one torch
tensor of them.
"""

import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import numpy

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.dtypes import FLOATS, as_torch, cast, type_name
from megatron_mixtral.weights.files import file_layout
from megatron_mixtral.weights.plan import TensorSlice
from megatron_mixtral.weights.protocols import Fragment, TensorSource, narrow
from megatron_mixtral.weights.rules import Shape

BLOCK = 1 << 20  # bytes handled at a time: small enough to stay in the cache between checksum and write


def blocks(target: TensorSlice, source: TensorSource, dtype: str | None = None) -> Iterator[numpy.ndarray]:
    """The stored bytes of `target` in order, as contiguous carrier arrays of about `BLOCK` bytes, in type `dtype`.

    None keeps the source's type, which all pieces must share (`payload` sees to it).
    """
    parts = [source.fragments(piece) for piece in target.pieces]
    for run, kind in _runs(target, parts):
        for block in _cut(run):
            yield block if dtype in (None, kind) else cast(block, kind, dtype)
    if target.padding:
        kind = FLOATS[dtype or parts[0][0].dtype]
        yield from _cut(numpy.zeros((target.padding, *target.view[1:]), kind.carrier))


def _runs(target: TensorSlice, parts: list[list[Fragment]]) -> Iterator[tuple[numpy.ndarray, str]]:
    """Arrays that are `target` when laid one behind the other, each with its type. Padding is not among them."""
    dim = target.rule.shard_dim
    inside = [_inside(target, fragments) for fragments in parts]
    if dim == len(target.view) - 1 and dim > 0:
        yield from _columns(inside[0])
    elif len(parts) > 1 and target.rule.join_dim > dim:  # pieces alternate, unit by unit
        assert dim == 0, f"{target.rule.name}: joined inside of dim {dim}"
        units = [[(unit, kind) for array, kind in runs for unit in array] for runs in inside]
        yield from chain.from_iterable(zip(*units, strict=True))
    else:
        yield from chain.from_iterable(inside)


def _inside(target: TensorSlice, fragments: list[Fragment]) -> list[tuple[numpy.ndarray, str]]:
    """What of a piece's fragments lies in a slice, in order, each with its type."""
    end, found = target.start + target.length - target.padding, []
    for part in fragments:
        low, high = max(target.start, part.start), min(end, part.start + part.length)
        if low < high:
            found.append((narrow(part.data, target.rule.shard_dim, low - part.start, high - low), part.dtype))
    return found


def _columns(runs: list[tuple[numpy.ndarray, str]]) -> Iterator[tuple[numpy.ndarray, str]]:
    """The rows of columns that lie side by side, a block at a time."""
    arrays, kind = [array for array, _ in runs], runs[0][1]
    if len(arrays) == 1 and arrays[0].flags.c_contiguous:
        yield arrays[0], kind
        return
    step = max(1, BLOCK // sum(array[:1].nbytes for array in arrays))
    for row in range(0, len(arrays[0]), step):
        yield numpy.hstack([array[row:row + step] for array in arrays]), kind


def _cut(run: numpy.ndarray) -> Iterator[numpy.ndarray]:
    """A run in contiguous blocks."""
    if run.nbytes <= BLOCK:
        yield numpy.ascontiguousarray(run).reshape(-1)
    elif run.flags.c_contiguous:
        flat, step = run.reshape(-1), BLOCK // run.itemsize
        for at in range(0, len(flat), step):
            yield flat[at:at + step]
    else:
        for part in run:
            yield from _cut(part)


def payload(target: TensorSlice, source: TensorSource, dtypes: dict[str, str],
            shape: Shape | None = None) -> file_layout.Payload:
    """A slice as something to be stored, in the type that `dtypes` says for its pieces (and in another shape).

    Raises `CheckpointError` when the pieces are of different types.
    """
    kinds = sorted({dtypes[piece.name] for piece in target.pieces})
    if len(kinds) > 1:
        raise CheckpointError(f"{target.name}: its parts are of different types ({', '.join(kinds)}); give "
                              "--params-dtype to store one")
    return file_layout.Payload(target.name, target.elements * FLOATS[kinds[0]].itemsize,
                               partial(blocks, target, source, kinds[0]), kinds[0], shape or target.shape)


def assemble(target: TensorSlice, source: TensorSource, dtype: Any = None) -> Any:
    """The torch tensor that `target` describes, of its stored shape, in `dtype` (None: the source's)."""
    name = type_name(dtype) or source.dtype(target.pieces[0])
    found = list(blocks(target, source, name))
    return as_torch(numpy.concatenate(found).reshape(target.shape), name)


def checksum(found: Iterable[Any]) -> int:
    """CRC-32 of blocks of bytes."""
    crc = 0
    for block in found:
        crc = zlib.crc32(block, crc)
    return crc
