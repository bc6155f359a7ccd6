"""Damage to checkpoints of every format, drawn with a seed.

Each function changes a directory named after its format (`safetensors`, `bin`, `ranks`, `dist`) and returns words that
the refusal must have. `structure` gives the bytes of a file that are no weight's payload.
"""

import io
import json
import pickle
import random
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NORM, CHUNK = "model.layers.1.input_layernorm.weight", "decoder.layers.mlp.router.weight"
MG_NORM = "decoder.layers.0.input_layernorm.weight"
CANARY = "canary"


def split_distcp(directory: Path) -> None:
    data = (directory / "__0_0.distcp").read_bytes()
    with metadata(directory) as contents:
        regions = sorted({(info.offset, info.length) for info in contents.storage_data.values()})
        middle = len(regions) // 2
        end, cut = sum(regions[middle - 1]), regions[middle][0]
        for info in contents.storage_data.values():
            if info.offset >= cut:
                info.relative_path, info.offset = "__1_0.distcp", info.offset - cut
    (directory / "__0_0.distcp").write_bytes(data[:end])
    (directory / "__1_0.distcp").write_bytes(data[cut:])


class metadata:
    """The unpickled .metadata of a distributed checkpoint, to be changed in a with block."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / ".metadata"

    def __enter__(self):
        self.contents = pickle.loads(self.path.read_bytes())
        return self.contents

    def __exit__(self, *_) -> None:
        self.path.write_bytes(pickle.dumps(self.contents))


def files_of(directory: Path) -> list[Path]:
    """The files with weights."""
    return sorted(path for path in directory.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".distcp"))


def index_of(directory: Path) -> Path:
    return next(directory.glob("*.index.json"))


def truncated(directory: Path, draw: random.Random) -> list[str]:
    path = draw.choice(files_of(directory))
    data = path.read_bytes()
    path.write_bytes(data[:draw.choice([0, 1, 9, len(data) - 1, draw.randrange(len(data))])])
    return [str(path)]


def missing_file(directory: Path, draw: random.Random) -> list[str]:
    path = draw.choice(files_of(directory))
    path.unlink()
    # Without the first rank's file the layout is not known.
    return ["no shard of rank 0"] if "mp_rank_00_000_000" in str(path) else [path.name]


def swapped_files(directory: Path, draw: random.Random) -> list[str]:
    one, other = draw.sample(files_of(directory), 2)
    one.rename(directory / "held")
    other.rename(one)
    (directory / "held").rename(other)
    return [str(directory)]


def other_contents(directory: Path, draw: random.Random) -> list[str]:
    path = draw.choice(files_of(directory))
    path.write_bytes(draw.choice([b"version https://git-lfs.github.com/spec/v1\n", draw.randbytes(5000), bytes(4000)]))
    return [str(path)]


def rewrite_tensors(path: Path, change: Callable[[dict], None]) -> None:
    """Change the state dict of a safetensors, .bin or rank file."""
    if path.suffix == ".safetensors":
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    else:
        contents = torch.load(path, weights_only=False)
        change(contents.get("model", contents))
        torch.save(contents, path)


def wrong_tensor(directory: Path, draw: random.Random) -> list[str]:
    if directory.name == "dist":
        return wrong_chunk(directory, draw)
    if directory.name == "ranks":
        path, name = draw.choice(files_of(directory)), MG_NORM
    else:
        path = directory / json.loads(index_of(directory).read_text())["weight_map"][NORM]
        name = NORM
    changes = (lambda t: t.update({name: t[name][:-1].clone()}), lambda t: t.update({name: t[name][None].clone()}),
               lambda t: t.update({name: t[name].to(torch.int8)}), lambda t: t.pop(name),
               lambda t: t.update({f"{name}.again": t[name].clone()}))
    rewrite_tensors(path, draw.choice(changes))
    return [str(path), name]


def wrong_chunk(directory: Path, draw: random.Random) -> list[str]:
    release = directory / "release"
    with metadata(release) as contents:
        tensor = contents.state_dict_metadata[CHUNK]
        kind = draw.randrange(6)
        if kind == 0:
            tensor.size = torch.Size([2, 2, 9])
        elif kind == 1:
            tensor.chunks[1].sizes = torch.Size([1, 2, 4])
        elif kind == 2:
            tensor.chunks.pop()
            return [str(release), "model.layers.1.block_sparse_moe.gate.weight"]
        elif kind == 3:
            del contents.state_dict_metadata[CHUNK]
        elif kind == 4:
            contents.state_dict_metadata[f"{CHUNK}.again"] = tensor
        else:  # two chunks of one size, each where the other should be
            one, other = (info for index, info in contents.storage_data.items() if index.fqn == CHUNK)
            one.offset, other.offset = other.offset, one.offset
            one.relative_path, other.relative_path = other.relative_path, one.relative_path
    return [str(release), CHUNK]


def wrong_path(directory: Path, draw: random.Random) -> list[str]:
    """An entry that points to a file that is not there, or out of the folder to one that is."""
    outside = directory.parent / "outside.safetensors"
    path = draw.choice(["absent.safetensors", "../outside.safetensors", str(outside), "./x/../../outside.safetensors",
                        "..\\outside.safetensors", ""])
    shutil.copy(files_of(directory)[0], outside)
    if directory.name == "ranks":
        (directory / "latest_checkpointed_iteration.txt").write_text(draw.choice(["7", "../safetensors", "-1", ""]))
        return ["latest_checkpointed_iteration.txt"]
    if directory.name == "dist":
        with metadata(directory / "release") as contents:
            next(info for index, info in contents.storage_data.items() if index.fqn == CHUNK).relative_path = path
        return [".metadata", CHUNK]
    index = json.loads(index_of(directory).read_text())
    index["weight_map"][NORM] = path
    index_of(directory).write_text(json.dumps(index))
    return [index_of(directory).name, NORM]


class Gadget:
    """Writes the canary when it is unpickled."""

    def __init__(self, path: Path, way: int) -> None:
        self.path, self.way = path, way

    def __reduce__(self):
        text = f"open({str(self.path)!r}, 'w').write('sung')"
        return [(eval, (text,)), (exec, (text,)), (Path.touch, (self.path,)), (open, (str(self.path), "w")),
                (getattr, (self.path, "touch"))][self.way]


def running_code(directory: Path, draw: random.Random) -> list[str]:
    """A pickle that runs something: as the metadata, as a whole file, or inside of a zip that is otherwise right."""
    gadget = pickle.dumps(Gadget(directory.parent / CANARY, draw.randrange(5)), protocol=draw.choice([2, 4]))
    path = draw.choice(files_of(directory))
    if directory.name == "dist":
        if draw.random() < 0.5:
            path = directory / "release" / ".metadata"
            path.write_bytes(gadget)
            return [str(path), "wants the global"]
        with metadata(directory / "release") as contents:
            info = next(info for index, info in contents.storage_data.items() if index.fqn == CHUNK)
            path, length = directory / "release" / info.relative_path, info.length
            archive = with_pickle(path.read_bytes()[info.offset:info.offset + length], gadget)
            info.offset, info.length = path.stat().st_size, len(archive)
        with open(path, "ab") as file:
            file.write(archive)
        return [str(path), CHUNK, "wants the global"]
    if path.suffix == ".safetensors" or draw.random() < 0.3:
        path.write_bytes(gadget)
        return [str(path)]
    path.write_bytes(with_pickle(path.read_bytes(), gadget))
    return [str(path), "wants the global"]


def with_pickle(archive: bytes, pickled: bytes) -> bytes:
    """A torch archive with another data.pkl."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, pickled if entry.filename.endswith("/data.pkl") else old.read(entry))
    return out.getvalue()


DAMAGES = (truncated, missing_file, swapped_files, other_contents, wrong_tensor, wrong_path, running_code)


def structure(path: Path) -> Iterator[int]:
    """The places of the bytes of a file that are no weight's payload."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        yield from range(8 + int.from_bytes(data[:8], "little"))
    elif path.suffix in (".distcp", ".pt", ".bin"):
        for offset, length in archives(path):
            yield from (offset + at for at in outside_storages(data[offset:offset + length]))
    else:
        yield from range(len(data))


def payload(path: Path) -> list[int]:
    """The places of the bytes of a file of torch's archives that are a weight's payload."""
    inside = (at for offset, length in archives(path) for at in range(offset, offset + length))
    return sorted(set(inside) - set(structure(path)))


def archives(path: Path) -> list[tuple[int, int]]:
    """Where a file's archives begin, and their lengths."""
    if path.suffix != ".distcp":
        return [(0, path.stat().st_size)]
    regions = pickle.loads((path.parent / ".metadata").read_bytes()).storage_data.values()
    # A tensor with two keys is listed twice.
    return list(dict.fromkeys((one.offset, one.length) for one in regions if one.relative_path == path.name))


def outside_storages(data: bytes) -> Iterator[int]:
    at = 0
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            if re.search(r"/data/\d+$", entry.filename):
                name, extra = struct.unpack("<HH", data[entry.header_offset + 26:entry.header_offset + 30])
                start = entry.header_offset + 30 + name + extra
                yield from range(at, start)
                at = start + entry.file_size
    yield from range(at, len(data))
