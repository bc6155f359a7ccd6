"""The `.metadata` of a distributed checkpoint, read and written without torch.distributed.

The file is a pickle of `torch.distributed.checkpoint.metadata.Metadata`. It is read as inert records, so that nothing
in it runs, and written by the names of its classes.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_mixtral.disk import START, placeholder
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.files import file_layout, inert_pickle, pickle_writer
from megatron_mixtral.weights.formats.directory import file_beside
from megatron_mixtral.weights.rules import Shape, dist_names

METADATA_FILE = ".metadata"
COMMON = "common_state/shard_0_1"  # arguments, iteration and other small state
COMMON_FILE = "common.pt"  # where older engines put it

_MODULE = "torch.distributed.checkpoint.metadata"
Call, Global, Region = pickle_writer.Call, pickle_writer.Global, file_layout.Region


@dataclass(frozen=True)
class StoredChunk:
    """One stored box of a tensor: its place in the whole, its shape, and where its bytes are."""

    offsets: Shape
    sizes: Shape
    region: Region


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint, of global shape `size`, in chunks."""

    size: Shape
    dtype: str
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True)
class Contents:
    """What a distributed checkpoint holds: tensors and pickled objects, by key."""

    tensors: dict[str, StoredTensor]
    objects: dict[str, Region]

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.tensors, *self.objects)


def read_contents(directory: Path) -> Contents:
    """Read `directory/.metadata`. Raises `CheckpointError` naming the file, and the key where there is one."""
    path = directory / METADATA_FILE
    contents = path.read_bytes()
    cure = placeholder(contents[:START])
    if cure is not None:
        raise CheckpointError(f"{path} {cure}")
    try:
        metadata = inert_pickle.unpickle(contents, str(path))
        regions = {(index.fqn, _offset(index)): info for index, info in metadata.storage_data.items()}
        entries = dict(metadata.state_dict_metadata)
        tensors, objects = {}, {}
        for key, entry in entries.items():
            if hasattr(entry, "chunks"):
                tensors[key] = _tensor(key, entry, regions, directory)
            else:
                objects[key] = _region(key, regions[key, None], directory)
    except inert_pickle.UNPICKLING_ERRORS as error:
        raise CheckpointError(f"{path} cannot be read as the metadata of a distributed checkpoint: "
                              f"{type(error).__name__} {error}") from None
    _check_apart(path, tensors)
    return Contents(tensors, objects)


def _check_apart(path: Path, tensors: dict[str, StoredTensor]) -> None:
    """Raise `CheckpointError` where two chunks share bytes: one of them is not where it should be.

    One tensor under two names of its own is none.
    """
    found = sorted({(str(chunk.region.file), chunk.region.offset, chunk.region.length, dist_names(key)[0],
                     chunk.offsets) for key, tensor in tensors.items() for chunk in tensor.chunks})
    for (file, offset, length, key, at), (other_file, other_offset, _, other, other_at) in pairwise(found):
        if file == other_file and offset + length > other_offset:
            raise CheckpointError(f"{path}: {key} at {at} and {other} at {other_at} share bytes of {file}; "
                                  "one is stored twice, or elsewhere")


def _offset(index: Any) -> Shape | None:
    offset = getattr(index, "offset", None)
    return None if offset is None else tuple(offset)


def _tensor(key: str, entry: Any, regions: dict[tuple[str, Shape | None], Any], directory: Path) -> StoredTensor:
    chunks, whole = [], tuple(entry.size)
    for chunk in entry.chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        if (key, offsets) not in regions:
            raise CheckpointError(f"{directory / METADATA_FILE}: the chunk of {key} at {offsets} is stored nowhere")
        if not len(whole) == len(offsets) == len(sizes) or any(
                not 0 <= at <= at + size <= end for at, size, end in zip(offsets, sizes, whole, strict=True)):
            raise CheckpointError(f"{directory / METADATA_FILE}: {key} has shape {whole}, but a chunk of {sizes} at "
                                  f"{offsets}, which is not within it")
        chunks.append(StoredChunk(offsets, sizes, _region(key, regions[key, offsets], directory)))
    properties = entry.properties
    dtype = properties.state[0] if hasattr(properties, "state") else properties.dtype
    if not isinstance(dtype, inert_pickle.TypeRecord):
        raise CheckpointError(f"{directory / METADATA_FILE}: {key} has no type")
    return StoredTensor(whole, str(dtype), tuple(chunks))


def _region(key: str, info: Any, directory: Path) -> Region:
    path = file_beside(directory, info.relative_path, f"{directory / METADATA_FILE}: {key}")
    if getattr(info, "transform_descriptors", None):
        raise CheckpointError(f"{path}: {key} is stored with transforms {info.transform_descriptors}, which are not "
                              "supported")
    if info.offset < 0 or info.length <= 0 or info.offset + info.length > path.stat().st_size:
        raise CheckpointError(f"{path}: {key} should lie at bytes {info.offset} to {info.offset + info.length}, but "
                              f"the file has {path.stat().st_size}; it is truncated or of another checkpoint")
    return Region(path, info.offset, info.length)


# -- Writing ---------------------------------------------------------------------------------------------


def contents_bytes(contents: Contents) -> bytes:
    """The file of what `contents` says; every tensor under all keys that layer specifications know it by."""
    entries: dict[str, Call] = {}
    stored: list[tuple[Region, str, Shape | None]] = [(region, key, None) for key, region in contents.objects.items()]
    for key, tensor in contents.tensors.items():
        properties = Call(Global(_MODULE, "TensorProperties"), (), new=True, state=(
            Global("torch", tensor.dtype), Call(Global("torch.serialization", "_get_layout"), ("torch.strided",)),
            False, Call(Global(_MODULE, "_MEM_FORMAT_ENCODING"), (0,)), False))
        boxes = [_object("ChunkStorageMetadata", offsets=_size(chunk.offsets), sizes=_size(chunk.sizes))
                 for chunk in tensor.chunks]
        for name in dist_names(key):
            entries[name] = _object("TensorStorageMetadata", properties=properties, size=_size(tensor.size),
                                    chunks=boxes)
        stored += [(chunk.region, key, chunk.offsets) for chunk in tensor.chunks]
    stored.sort(key=lambda item: (len(item[0].file.name), item[0].file.name, item[0].offset))
    entries |= {key: _object("BytesStorageMetadata") for _, key, offsets in stored if offsets is None}
    storage = {
        _object("MetadataIndex", fqn=name, offset=None if offsets is None else _size(offsets), index=None):
        Call(Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"), (), new=True, state={
            "relative_path": region.file.name, "offset": region.offset, "length": region.length,
            "transform_descriptors": None})
        for region, key, offsets in stored for name in dist_names(key)}
    return pickle_writer.dumps(_object("Metadata", state_dict_metadata=entries, planner_data=None, storage_data=storage,
                                       storage_meta=None, version="1.0.0"))


def _object(name: str, **state: Any) -> Call:
    return Call(Global(_MODULE, name), (), state or None, new=True)


def _size(shape: Shape) -> Call:
    return Call(Global("torch", "Size"), (tuple(shape),))
