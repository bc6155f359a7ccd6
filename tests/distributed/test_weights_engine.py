"""The engine's own models against what is written, and the engine's distributed checkpoints as a source."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import TINY, assert_same_weights, random_hf_directory

from megatron_mixtral.config import MixtralConfig, ParallelLayout
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights import convert, open_source
from megatron_mixtral.weights.formats import DistSink, DistSource, HFSink, HFSource, RankDirSink

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {
    "tp1": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "ep2": {"ep": 2}, "tp2-pp2": {"tp": 2, "pp": 2},
    "tp2-ep2": {"tp": 2, "ep": 2}, "tp2-ep2-etp1": {"tp": 2, "ep": 2, "etp": 1},
    "tp2-pp2-ep2": {"tp": 2, "pp": 2, "ep": 2}, "pp2-ep2-vpp2": {"pp": 2, "ep": 2, "vpp": 2},
    "uneven": {"pp": 2, "first": 1, "last": 3}, "tied-tp2": {"tp": 2}, "tied-pp2": {"pp": 2},
    "tied-pp2-vpp2": {"pp": 2, "vpp": 2},
}


def original(root: Path, name: str) -> Path:
    return root / ("hf-tied" if name.startswith("tied") else "hf")


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Path:
    """For every layout: rank directories written here, and what the engine made of them (one process for all)."""
    root = tmp_path_factory.mktemp("engine")
    config = TINY | {"vocab_size": 97}  # odd: padded everywhere
    random_hf_directory(root / "hf", MixtralConfig(**config), torch.bfloat16)
    random_hf_directory(root / "hf-tied", MixtralConfig(**config, tie_word_embeddings=True), torch.bfloat16)
    for name in ("hf", "hf-tied"):
        source = HFSource(root / name)
        convert(source, DistSink(root / f"{name}-ours"))
    requests = []
    for name, layout in LAYOUTS.items():
        source = HFSource(original(root, name))
        convert(source, RankDirSink(root / name, ParallelLayout(**layout), vocab_divisible_by=3))
        requests.append({"checkpoint": str(root / name), "layout": layout, "names": str(root / f"{name}.json"),
                         "ours": str(root / f"{original(root, name).name}-ours" / "release"),
                         "dist": str(root / f"{name}-dist" / "iter_0000007")})
    (root / "requests.json").write_text(json.dumps(requests))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", str(ROOT / "tests/helpers/engine_files.py"),
                           str(root / "requests.json")], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rank_files_are_the_engines_state_dicts(engine, layout):
    found = json.loads((engine / f"{layout}.json").read_text())
    assert len(found) == ParallelLayout(**LAYOUTS[layout]).min_world * LAYOUTS[layout].get("vpp", 1)
    for where, shard in found.items():
        assert shard["engine"] == shard["stored"], where
        assert not shard["different"], where
        assert not shard["loaded"], where  # one distributed checkpoint written here fills any layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_engines_distributed_checkpoint_becomes_the_original(engine, layout, tmp_path):
    source = open_source(engine / f"{layout}-dist" / "iter_0000007")
    assert isinstance(source, DistSource)
    assert source.config == MixtralConfig.from_hf_dir(original(engine, layout))  # from the arguments stored in it
    convert(source, HFSink(tmp_path / "hf"))
    assert_same_weights(original(engine, layout), tmp_path / "hf")


@pytest.mark.parametrize("name", ["hf", "hf-tied"])
def test_torch_reads_the_metadata_and_we_read_it_back(engine, tmp_path, name):
    from torch.distributed.checkpoint import FileSystemReader

    metadata = FileSystemReader(engine / f"{name}-ours" / "release").read_metadata()
    assert metadata.state_dict_metadata[QKV].size == torch.Size([4, 64, 32])
    assert metadata.state_dict_metadata[QKV].properties.dtype == torch.bfloat16
    source = open_source(engine / f"{name}-ours")
    (engine / f"{name}-ours" / "mixtral_config.json").rename(tmp_path / "kept")  # then from its arguments
    assert open_source(engine / f"{name}-ours").config == source.config
    (tmp_path / "kept").rename(engine / f"{name}-ours" / "mixtral_config.json")
    convert(source, HFSink(tmp_path / "back"), verify=True)
    assert_same_weights(engine / name, tmp_path / "back")


def test_a_distributed_checkpoint_of_the_engine_is_written_anew(engine, tmp_path):
    source = open_source(engine / "tp2-pp2-ep2-dist" / "iter_0000007")
    convert(source, DistSink(tmp_path / "mg", ParallelLayout(tp=2), vocab_divisible_by=8), verify=True)
    back = open_source(tmp_path / "mg")
    convert(back, HFSink(tmp_path / "back"))
    assert_same_weights(engine / "hf", tmp_path / "back")


def test_distributed_checkpoint_to_rank_directories(engine, tmp_path):
    source = open_source(engine / "tp2-pp2-ep2-dist" / "iter_0000007")
    convert(source, RankDirSink(tmp_path / "mg", ParallelLayout(tp=1, pp=4, ep=4)))
    back = open_source(tmp_path / "mg")
    convert(back, HFSink(tmp_path / "hf"))
    assert_same_weights(engine / "hf", tmp_path / "hf")


# -- Refusals --------------------------------------------------------------------------------------------


@pytest.fixture
def dist(engine, tmp_path) -> Path:
    """A copy of a distributed checkpoint with our configuration beside it."""
    shutil.copytree(engine / "tp2-pp2-dist" / "iter_0000007", tmp_path / "ck" / "iter_0000007")
    shutil.copyfile(engine / "tp2-pp2" / "mixtral_config.json", tmp_path / "ck" / "mixtral_config.json")
    (tmp_path / "ck" / "latest_checkpointed_iteration.txt").write_text("7")
    return tmp_path / "ck"


def edit_metadata(directory: Path, edit) -> None:
    path = directory / "iter_0000007" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def refused(directory: Path, sentence: str) -> str:
    out = directory.parent / "out"
    with pytest.raises(CheckpointError, match=sentence) as error:
        source = open_source(directory)
        convert(source, HFSink(out))
    assert sorted(path.name for path in directory.parent.iterdir()) == ["ck"]
    return str(error.value)


QKV = "decoder.layers.self_attention.linear_qkv.weight"


def chunk_info(metadata, key):
    return next(info for index, info in metadata.storage_data.items() if index.fqn == key)


@pytest.mark.parametrize("edit, sentence", [
    (lambda m: m.state_dict_metadata.pop(QKV), f"{QKV} is missing"),
    (lambda m: m.state_dict_metadata[QKV].chunks.pop(), "missing or stored twice|are stored"),
    (lambda m: m.state_dict_metadata[QKV].chunks.append(m.state_dict_metadata[QKV].chunks[0]), "stored twice"),
    (lambda m: m.state_dict_metadata.update(surplus=m.state_dict_metadata[QKV]), "surplus|stored nowhere"),
    (lambda m: setattr(m.state_dict_metadata[QKV], "size", torch.Size([4, 64, 31])), "has shape"),
    (lambda m: setattr(chunk_info(m, QKV), "relative_path", "../outside"), "same folder"),
    (lambda m: setattr(chunk_info(m, QKV), "relative_path", "__9_9.distcp"), "does not exist"),
    (lambda m: setattr(chunk_info(m, QKV), "offset", 10**9), "truncated"),
    (lambda m: setattr(chunk_info(m, QKV), "offset", 3), "torch file|not the|storage"),
    (lambda m: m.storage_data.clear(), "stored nowhere|cannot be read"),
], ids=["missing", "chunk", "twice", "surplus", "shape", "outside", "no file", "beyond", "misplaced", "empty"])
def test_damaged_metadata_is_refused(dist, edit, sentence):
    edit_metadata(dist, edit)
    refused(dist, sentence)


def test_broken_files_are_refused(dist):
    path = dist / "iter_0000007" / ".metadata"
    data = path.read_bytes()
    for broken in (data[:300], b"", b"nonsense", data[:-1]):
        path.write_bytes(broken)
        assert ".metadata" in refused(dist, "cannot be read")
    path.write_bytes(data)
    os.truncate(dist / "iter_0000007" / "__0_0.distcp", 9000)
    assert "__0_0.distcp" in refused(dist, "truncated")


def test_swapped_chunks_of_unlike_tensors_are_noticed(dist):
    def swap(metadata):
        a, b = chunk_info(metadata, QKV), chunk_info(metadata, "decoder.layers.self_attention.linear_proj.weight")
        a.offset, b.offset, a.length, b.length = b.offset, a.offset, b.length, a.length

    edit_metadata(dist, swap)
    assert "distcp" in refused(dist, "is not the")


class Payload:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_a_pickled_payload_does_not_run(dist):
    edit_metadata(dist, lambda m: setattr(m, "planner_data", Payload()))
    assert "nothing in it was run" in refused(dist, r"posix\.system")
