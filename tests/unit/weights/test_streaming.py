"""Planned files: what plain torch and zip readers make of them, checksums, NaN, disk space, one writer at a time."""

import os
import shutil
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from helpers.models import TINY, assert_same_weights, random_hf_directory, tensors_of
from safetensors.torch import save_file

from megatron_mixtral.config import MixtralConfig, ParallelLayout
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights import conversion
from megatron_mixtral.weights.files import atomic, file_layout, mapped, torch_files, writer
from megatron_mixtral.weights.files.mapped import MappedFile
from megatron_mixtral.weights.formats.dist_sink import DistSink
from megatron_mixtral.weights.formats.dist_source import DistSource
from megatron_mixtral.weights.formats.hf_sink import HFSink
from megatron_mixtral.weights.formats.hf_source import HFSource
from megatron_mixtral.weights.formats.rank_sink import RankDirSink
from megatron_mixtral.weights.formats.rank_source import RankDirSource
from megatron_mixtral.weights.plan import all_plans
from megatron_mixtral.weights.streaming import assemble


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return random_hf_directory(tmp_path_factory.mktemp("hf") / "hf", MixtralConfig(**TINY), torch.bfloat16)


def to_ranks(hf: Path, target: Path, **options) -> conversion.Report:
    source = HFSource(hf)
    return conversion.convert(source, RankDirSink(target, ParallelLayout(tp=2, ep=2)), **options)


def test_torch_maps_the_archive_and_zip_readers_find_its_checksums_right(hf, tmp_path):
    to_ranks(hf, tmp_path / "mg")
    path = tmp_path / "mg/release/mp_rank_01_001/model_optim_rng.pt"
    import argparse

    with torch.serialization.safe_globals([argparse.Namespace]):
        model = torch.load(path, mmap=True, weights_only=True)["model"]
    norm = model["decoder.final_layernorm.weight"]
    assert torch.equal(norm, tensors_of(hf)["model.norm.weight"]) and norm.data_ptr() % 64 == 0
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_offsets_beyond_4_gib(tmp_path):
    """A sparse file of 6 GB, which takes no room on the disk."""
    sizes = (1_500_000_000, 1_500_000_000, 3)
    plain = {"number": -2**40, "float": 0.5, "rest": [None, (True, "x")]}
    tensors = [file_layout.Payload("", 2 * size, tuple, "bfloat16", (size,)) for size in sizes]
    planned = file_layout.torch_archive({"tensors": tensors, "plain": plain})
    with open(tmp_path / "large.pt", "wb") as file:
        file.truncate(planned.size)
        for placed in planned.placed:
            file.seek(placed.offset - len(placed.before))
            file.write(placed.before)
            file.seek(placed.offset + placed.payload.size)
            file.write(placed.after(0))
        file.seek(planned.placed[2].offset)
        file.write(b"\x80\x3f" * 3)
        file.seek(planned.end_at)
        file.write(planned.end([0, 0, 0]))
    loaded = torch.load(tmp_path / "large.pt", mmap=True, weights_only=True)
    assert loaded["plain"] == plain
    assert loaded["tensors"][2].tolist() == [1, 1, 1] and loaded["tensors"][1].shape == (1_500_000_000,)
    ours = torch_files.load_torch(MappedFile(tmp_path / "large.pt"), "large.pt")
    assert ours["tensors"][2].data.tolist() == [0x3F80] * 3 and ours["plain"] == plain


def test_not_a_number_is_named(hf, tmp_path):
    tensors = tensors_of(hf)
    name = "model.layers.2.block_sparse_moe.experts.3.w2.weight"
    tensors[name][3, 5] = float("inf")
    shutil.copytree(hf, tmp_path / "bad")
    save_file(tensors, tmp_path / "bad" / "model.safetensors", {"format": "pt"})
    report = to_ranks(tmp_path / "bad", tmp_path / "mg", check_finite=True)
    # Expert 3 is the second of its rank; column 5 is in the first half.
    assert report.not_finite == ["release/mp_rank_00_001/model_optim_rng.pt: "
                                 "decoder.layers.2.mlp.experts.local_experts.1.linear_fc2.weight"]
    assert to_ranks(hf, tmp_path / "good", check_finite=True).not_finite == []


def test_a_bit_that_flips_on_the_way_is_found(hf, tmp_path, monkeypatch):
    write = writer._write

    def flip(handle, data, at):
        data = bytearray(data)
        if len(data) == 2 * 32 * 4:  # a router
            data[7] ^= 1
        write(handle, memoryview(data), at)

    monkeypatch.setattr(writer, "_write", flip)
    with pytest.raises(CheckpointError, match=r"layers\.0\.block_sparse_moe\.gate.*when read back"):
        to_ranks(hf, tmp_path / "mg", verify=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sink", [
    lambda target: RankDirSink(target, ParallelLayout(tp=2, ep=2)), HFSink,
    lambda target: RankDirSink(target, ParallelLayout(tp=1, pp=2)), DistSink], ids=["tp2", "hf", "pp2", "dist"])
def test_every_byte_of_the_source_is_read_once(hf, tmp_path, monkeypatch, sink):
    """Column slices read the rows of every tensor-parallel rank, and copies those of every expert-parallel one."""
    to_ranks(hf, tmp_path / "ranks")
    conversion.convert(HFSource(hf), DistSink(tmp_path / "dist"))
    fetch, read = mapped.Reader.fetch, []

    def count(self, array):
        read.append(array.nbytes)
        return fetch(self, array)

    monkeypatch.setattr(mapped.Reader, "fetch", count)
    monkeypatch.delattr(mapped.Reader, "_copy")  # and through the file: out of mapped memory a truncation is a SIGBUS
    sources = [HFSource(hf), RankDirSource(tmp_path / "ranks", compare_copies=False), DistSource(tmp_path / "dist")]
    size = 2 * sources[0].config.total_parameters
    for number, source in enumerate(sources):
        read.clear()
        conversion.convert(source, sink(tmp_path / f"out{number}"))
        assert sum(read) == size


def test_the_columns_of_one_rank_are_found_in_the_shards_of_others(tmp_path):
    config = MixtralConfig(**TINY | {"num_key_value_heads": TINY["num_attention_heads"]})
    hf = random_hf_directory(tmp_path / "hf", config, torch.bfloat16)
    conversion.convert(HFSource(hf), RankDirSink(tmp_path / "mg", ParallelLayout(tp=4)))
    whole, source = tensors_of(hf), RankDirSource(tmp_path / "mg")
    names = set()
    for plan in all_plans(source.config, ParallelLayout(tp=2)):
        for target in plan.tensors():
            if target.rule.name in ("proj", "fc2"):
                names.add(target.rule.name)
                expected = whole[target.pieces[0].name][:, target.start:target.start + target.length]
                assert torch.equal(assemble(target, source), expected)
    assert names == {"proj", "fc2"}


def test_every_checksum_is_right_with_and_without_the_fast_one(hf, tmp_path, monkeypatch):
    to_ranks(hf, tmp_path / "mg")
    conversion.convert(RankDirSource(tmp_path / "mg"), DistSink(tmp_path / "dist"))
    for path in tmp_path.rglob("*.pt"):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
    monkeypatch.setattr(writer, "crc32", zlib.crc32)
    to_ranks(hf, tmp_path / "plain")
    for path in (tmp_path / "mg" / "release").rglob("*.pt"):
        assert path.read_bytes() == (tmp_path / "plain" / path.relative_to(tmp_path / "mg")).read_bytes()


def test_a_disk_too_small_is_noticed_before_the_first_byte(hf, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage(10**6, 0, 1000))
    with pytest.raises(CheckpointError, match=r"needs .* kB, but .* has 1 kB free"):
        to_ranks(hf, tmp_path / "mg")
    assert list(tmp_path.iterdir()) == []


def test_two_conversions_to_one_target_exclude_each_other(hf, tmp_path):
    with atomic.staged(tmp_path / "mg"):
        with pytest.raises(CheckpointError, match="another conversion"):
            to_ranks(hf, tmp_path / "mg")
        assert (tmp_path / ".mg.partial").exists()


def killed_after_a_file(source, folder, monkeypatch) -> Path:
    """What a conversion leaves that was killed when it had finished its first file."""
    note = atomic.Stage.note

    def killed(self, *args):
        note(self, *args)
        shutil.copytree(self.root, folder / "left")
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(atomic.Stage, "note", killed)
        with pytest.raises(CheckpointError, match="killed"):
            to_ranks(source, folder / "killed", jobs=1)
    return folder / "left"


def test_resuming_something_else_starts_anew(hf, tmp_path, monkeypatch):
    other = random_hf_directory(tmp_path / "other", MixtralConfig(**TINY), torch.bfloat16, seed=5)
    killed_after_a_file(other, tmp_path, monkeypatch).rename(tmp_path / ".mg.partial")
    report = to_ranks(hf, tmp_path / "mg", resume=True)
    assert report.resumed == []
    back = RankDirSource(tmp_path / "mg")
    conversion.convert(back, HFSink(tmp_path / "hf"))
    assert_same_weights(hf, tmp_path / "hf")


def test_a_source_written_again_is_read_again(hf, tmp_path, monkeypatch):
    """The source gets other weights of the same sizes before the conversion is taken up."""
    source = Path(shutil.copytree(hf, tmp_path / "source"))
    left = killed_after_a_file(source, tmp_path, monkeypatch)
    shutil.copytree(left, tmp_path / ".mg.partial")
    assert len(to_ranks(source, tmp_path / "mg", resume=True).resumed) == 1
    weights = source / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in tensors_of(hf).items()}, weights, {"format": "pt"})
    assert weights.stat().st_size == (hf / "model.safetensors").stat().st_size
    left.rename(tmp_path / ".again.partial")
    assert to_ranks(source, tmp_path / "again", resume=True).resumed == []
    conversion.convert(RankDirSource(tmp_path / "again"), HFSink(tmp_path / "back"))
    assert_same_weights(source, tmp_path / "back")


def test_a_failing_file_stops_the_others_and_leaves_nothing(hf, tmp_path, monkeypatch):
    whole = writer.FileWriter.open

    def fail(self):
        if "00_001" in str(self.path):
            raise OSError("No space left on device")
        return whole(self)

    monkeypatch.setattr(writer.FileWriter, "open", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        to_ranks(hf, tmp_path / "mg", jobs=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("new", [True, False])
def test_bin_files_are_read(hf, tmp_path, new):
    (tmp_path / "bin").mkdir()
    shutil.copy(hf / "config.json", tmp_path / "bin")
    torch.save(tensors_of(hf), tmp_path / "bin" / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    source = HFSource(tmp_path / "bin")
    conversion.convert(source, HFSink(tmp_path / "back"))
    assert_same_weights(hf, tmp_path / "back")


def test_moving_weights_needs_no_torch(hf, tmp_path):
    import subprocess
    import sys

    code = ("import sys; from megatron_mixtral.weights import cli; cli.convert(sys.argv[1:]); "
            "sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, "--loader", "mixtral_hf", "--load-dir", str(hf), "--save-dir",
                           str(tmp_path / "mg")], check=False)
    assert done.returncode == 0


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _write_anew(path: Path) -> None:
    path.write_bytes(path.read_bytes())


def _replace(path: Path) -> None:
    before = path.stat()
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("moment", ["the first byte", "the last file"])
@pytest.mark.parametrize("change", [_truncate, _write_anew, _replace, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_source_that_changes_while_it_is_converted_is_refused(hf, tmp_path, monkeypatch, name, change, moment):
    """Truncated, it ended the process by SIGBUS; written anew, the result was a mixture, with status 0."""
    source, write, sync = Path(shutil.copytree(hf, tmp_path / "hf")), writer._write, writer.sync
    due = [change]

    def meddle(_: object) -> None:
        if due:
            due.pop()(source / name)

    def first(handle: int, data: object, at: int) -> None:
        meddle(handle)
        write(handle, data, at)

    if moment == "the first byte":
        monkeypatch.setattr(writer, "_write", first)
    else:
        monkeypatch.setattr(writer, "sync", lambda path: (sync(path), "00_000" in str(path) and meddle(path)))
    with pytest.raises(CheckpointError, match=rf"{name} (had|was|cannot).*(start again|No such file)"):
        to_ranks(source, tmp_path / "mg", verify=moment != "the first byte")
    assert not due and list(tmp_path.iterdir()) == [source]


def test_a_target_in_the_folder_of_the_source_is_not_of_the_source(hf, tmp_path):
    source = Path(shutil.copytree(hf, tmp_path / "hf"))
    to_ranks(source, source / "mg")
    (source / "mg").rename(source / ".mg.partial")
    (source / ".mg.partial" / "left").write_text("of a conversion that was killed")
    to_ranks(source, source / "mg")
    to_ranks(source, source / "mg2")
    assert sorted(path.name for path in source.iterdir() if path.is_dir()) == ["mg", "mg2"]
