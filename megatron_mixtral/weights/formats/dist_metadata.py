"""The `.metadata` of a distributed checkpoint, read without torch.distributed and without running what is in it.

The file is a pickle of `torch.distributed.checkpoint.metadata.Metadata`. A restricted unpickler maps the classes that
belong there to inert records and refuses every other global by name.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.files import Region, inert_pickle
from megatron_mixtral.weights.formats.directory import file_beside
from megatron_mixtral.weights.rules import Shape, dist_names

METADATA_FILE = ".metadata"
COMMON = "common_state/shard_0_1"  # arguments, iteration and other small state
COMMON_FILE = "common.pt"  # where older engines put it

_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.planner": (
        "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    "torch.distributed._shard.sharded_tensor.metadata": ("TensorProperties", "MEM_FORMAT_ENCODING"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}


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


def read_contents(directory: Path) -> Contents:
    """Read `directory/.metadata`. Raises `CheckpointError` naming the file, and the key where there is one."""
    path = directory / METADATA_FILE
    try:
        metadata = inert_pickle.unpickle(path.read_bytes(), str(path), "a checkpoint's metadata has", _RECORDS)
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
    chunks = []
    for chunk in entry.chunks:
        offsets = tuple(chunk.offsets)
        if (key, offsets) not in regions:
            raise CheckpointError(f"{directory / METADATA_FILE}: the chunk of {key} at {offsets} is stored nowhere")
        _check_inside(f"{directory / METADATA_FILE}: {key}", tuple(entry.size), offsets, tuple(chunk.sizes))
        chunks.append(StoredChunk(offsets, tuple(chunk.sizes), _region(key, regions[key, offsets], directory)))
    properties = entry.properties
    dtype = properties.state[0] if hasattr(properties, "state") else properties.dtype
    if not isinstance(dtype, inert_pickle.TypeRecord):
        raise CheckpointError(f"{directory / METADATA_FILE}: {key} has no type")
    return StoredTensor(tuple(entry.size), str(dtype), tuple(chunks))


def _check_inside(where: str, whole: Shape, offsets: Shape, sizes: Shape) -> None:
    """Raise `CheckpointError` for a chunk that is not a box within its tensor."""
    if not len(whole) == len(offsets) == len(sizes) or any(
            not 0 <= at <= at + size <= end for at, size, end in zip(offsets, sizes, whole, strict=True)):
        raise CheckpointError(f"{where} has shape {whole}, but a chunk of {sizes} at {offsets}, which is not within it")


def _region(key: str, info: Any, directory: Path) -> Region:
    path = file_beside(directory, info.relative_path, f"{directory / METADATA_FILE}: {key}")
    if getattr(info, "transform_descriptors", None):
        raise CheckpointError(f"{path}: {key} is stored with transforms {info.transform_descriptors}, which are not "
                              "supported")
    if info.offset < 0 or info.length <= 0 or info.offset + info.length > path.stat().st_size:
        raise CheckpointError(f"{path}: {key} should lie at bytes {info.offset} to {info.offset + info.length}, but "
                              f"the file has {path.stat().st_size}; it is truncated or of another checkpoint")
    return Region(path, info.offset, info.length)
