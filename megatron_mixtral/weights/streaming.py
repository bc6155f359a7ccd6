"""Reading weights in the order in which they will be stored: the bytes of a slice, block after block, from a source.

A block is read into memory that the processor's cache holds until it is summed and written. All slices of the same rows
are made in one pass (`cuts`): the columns of every tensor-parallel rank, and the copies that several ranks have. Sinks
plan with `payload`, and `files.writer` writes the blocks. `assemble` makes one torch tensor of them.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.dtypes import FLOATS, as_torch, cast, type_name
from megatron_mixtral.weights.files import Reader, file_layout
from megatron_mixtral.weights.plan import TensorSlice
from megatron_mixtral.weights.protocols import Fragment, TensorSource, narrow
from megatron_mixtral.weights.rules import Shape

BLOCK = 1 << 20  # bytes handled at a time: small enough to stay in the cache between checksum and write


def blocks(target: TensorSlice, source: TensorSource, dtype: str | None = None) -> Iterator[numpy.ndarray]:
    """The stored bytes of `target` in order, as contiguous carrier arrays of about `BLOCK` bytes, in type `dtype`.

    None keeps the source's type, which all pieces must share (`payload` sees to it).
    """
    for (block,) in cuts(target, source, dtype, [_interval(target)]):
        yield block


def cuts(target: TensorSlice, source: TensorSource, dtype: str | None,
         intervals: Sequence[tuple[int, int]]) -> Iterator[list[numpy.ndarray]]:
    """`blocks` of slices that differ from `target` in their (start, length) only, all of them from one pass.

    Several different ones there are of columns only: their rows are read whole, and cut while the cache holds them.
    """
    parts = [source.fragments(piece) for piece in target.pieces]
    with Reader() as reader:
        for found, kind in (_columns(parts[0], intervals, reader) if _by_columns(target) else
                            _blocks(target, parts, reader)):
            yield found if dtype in (None, kind) else [cast(block, kind, dtype) for block in found]
    if target.padding:
        kind = FLOATS[dtype or parts[0][0].dtype]
        yield from ([block] for block in _cut(numpy.zeros((target.padding, *target.view[1:]), kind.carrier)))


def _interval(target: TensorSlice) -> tuple[int, int]:
    return target.start, target.length


def _by_columns(target: TensorSlice) -> bool:
    return 0 < target.rule.shard_dim == len(target.view) - 1


def _blocks(target: TensorSlice, parts: list[list[Fragment]],
            reader: Reader) -> Iterator[tuple[list[numpy.ndarray], str]]:
    """The blocks of a slice of rows, each with its type. Padding is not among them."""
    dim = target.rule.shard_dim
    inside = [_inside(target, fragments) for fragments in parts]
    runs = chain.from_iterable(inside)
    if len(parts) > 1 and target.rule.join_dim > dim:  # pieces alternate, unit by unit
        assert dim == 0, f"{target.rule.name}: joined inside of dim {dim}"
        units = [[(unit, kind) for array, kind in runs for unit in array] for runs in inside]
        runs = chain.from_iterable(zip(*units, strict=True))
    for run, kind in runs:
        for block in _cut(run):
            yield [reader.fetch(block)], kind


def _inside(target: TensorSlice, fragments: list[Fragment]) -> list[tuple[numpy.ndarray, str]]:
    """What of a piece's fragments lies in a slice, in order, each with its type."""
    end, found = target.start + target.length - target.padding, []
    for part in fragments:
        low, high = max(target.start, part.start), min(end, part.start + part.length)
        if low < high:
            found.append((narrow(part.data, target.rule.shard_dim, low - part.start, high - low), part.dtype))
    return found


def _columns(fragments: list[Fragment], intervals: Sequence[tuple[int, int]],
             reader: Reader) -> Iterator[tuple[list[numpy.ndarray], str]]:
    """The rows of columns that lie side by side, a block at a time, cut into `intervals`, each with its type."""
    low, high = min(start for start, _ in intervals), max(start + length for start, length in intervals)
    used = [part for part in fragments if part.start < high and part.start + part.length > low]
    first, kind = used[0].start, used[0].dtype
    width = sum(part.length for part in used)
    step = max(1, BLOCK // (width * used[0].data.itemsize))
    for row in range(0, len(used[0].data), step):
        read = [reader.fetch(part.data[row:row + step]) for part in used]
        rows = read[0] if len(read) == 1 else numpy.hstack(read)
        yield [numpy.ascontiguousarray(rows[:, start - first:start - first + length])
               for start, length in intervals], kind


def _cut(run: numpy.ndarray) -> Iterator[numpy.ndarray]:
    """A run in parts of at most `BLOCK` bytes, which are contiguous where it is."""
    if run.nbytes <= BLOCK:
        yield run
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
                               partial(cuts, target, source, kinds[0]), kinds[0], shape or target.shape,
                               (*(piece.name for piece in target.pieces),
                                None if _by_columns(target) else _interval(target)), _interval(target))


def assemble(target: TensorSlice, source: TensorSource, dtype: Any = None) -> Any:
    """The torch tensor that `target` describes, of its stored shape, in `dtype` (None: the source's)."""
    name, at = type_name(dtype) or source.dtype(target.pieces[0]), 0
    found = numpy.empty(target.elements, FLOATS[name].carrier)
    for block in blocks(target, source, name):
        found[at:at + block.size] = block.reshape(-1)
        at += block.size
    assert at == target.elements, f"{target.name}: {at} elements, expected {target.elements}"
    return as_torch(found.reshape(target.shape), name)
