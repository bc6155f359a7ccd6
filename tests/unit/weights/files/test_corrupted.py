"""Hundreds of damaged checkpoints of every format: each is refused by name, runs nothing and leaves nothing behind.

Damage is drawn with fixed seeds from small whole checkpoints. A bit of a weight that flips is seen in torch's archives,
which have a checksum of each storage; safetensors have none (`inspect_checkpoint.py --deep` has those of a conversion
made with `--verify`). A bit that flips anywhere else is refused, or changes nothing of the result.
"""

import json
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.damage import DAMAGES, payload, split_distcp, structure
from helpers.models import assert_same_weights, random_hf_directory, tensors_of

from megatron_mixtral.config import MixtralConfig, ParallelLayout
from megatron_mixtral.errors import MixtralError
from megatron_mixtral.weights.conversion import convert
from megatron_mixtral.weights.files import sums
from megatron_mixtral.weights.formats.dist_sink import DistSink
from megatron_mixtral.weights.formats.hf_sink import HFSink
from megatron_mixtral.weights.formats.hf_source import HFSource
from megatron_mixtral.weights.formats.rank_sink import RankDirSink
from megatron_mixtral.weights.inspection import inspect
from megatron_mixtral.weights.opening import open_source

CONFIG = MixtralConfig(vocab_size=24, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
                       num_key_value_heads=2, num_local_experts=2)
FORMATS = ("safetensors", "bin", "ranks", "dist")


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    """A whole checkpoint of each format, all of the same model."""
    root = tmp_path_factory.mktemp("whole")
    source = HFSource(random_hf_directory(root / "hf", CONFIG, torch.bfloat16))
    convert(source, HFSink(root / "safetensors", max_shard_size="3KB"))
    convert(source, RankDirSink(root / "ranks", ParallelLayout(tp=2, pp=2, ep=2)))
    convert(source, DistSink(root / "dist"))
    (root / "bin").mkdir()
    shutil.copy(root / "hf" / "config.json", root / "bin")
    tensors, index = tensors_of(root / "hf"), {}
    for number, names in enumerate((list(tensors)[:10], list(tensors)[10:20], list(tensors)[20:])):
        torch.save({name: tensors[name] for name in names}, root / "bin" / f"pytorch_model-{number}.bin")
        index |= dict.fromkeys(names, f"pytorch_model-{number}.bin")
    (root / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    # The model is too small for several .distcp files, so its second half is moved to one of its own.
    split_distcp(root / "dist" / "release")
    for name in FORMATS:
        export(root / name, root / f"{name}-out")
        assert_same_weights(root / f"{name}-out", root / "hf")
    return {name: root / name for name in FORMATS}


def export(directory: Path, target: Path) -> bytes:
    """Convert to a single safetensors file and return its bytes."""
    source = open_source(directory)
    convert(source, HFSink(target))
    return (target / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_refused_by_name(originals, tmp_path, name, damage):
    for seed in range(5):
        directory = Path(shutil.copytree(originals[name], tmp_path / str(seed) / name))
        words = damage(directory, random.Random(seed))
        before = sorted(directory.parent.iterdir())
        with pytest.raises(MixtralError) as error:
            export(directory, directory.parent / "out")
        assert all(word in str(error.value) for word in words), (seed, words, str(error.value))
        assert sorted(directory.parent.iterdir()) == before, seed  # no output, no temporary directory, no canary


@pytest.mark.parametrize(("name", "pattern"), [
    ("safetensors", "*.safetensors"), ("safetensors", "*.index.json"), ("bin", "*.bin"), ("ranks", "release/*/*.pt"),
    ("dist", "release/*.distcp"), ("dist", "release/.metadata")])
def test_a_flipped_bit_is_refused_or_changes_nothing(originals, tmp_path, name, pattern):
    expected = (originals[name].parent / f"{name}-out" / "model.safetensors").read_bytes()
    draw, refused = random.Random(1), 0
    for number in range(30):
        directory = Path(shutil.copytree(originals[name], tmp_path / str(number) / name))
        path = draw.choice(sorted(directory.glob(pattern)))
        data, places = bytearray(path.read_bytes()), list(structure(path))
        at, bit = draw.choice(places), draw.randrange(8)
        data[at] ^= 1 << bit
        path.write_bytes(data)
        try:
            assert export(directory, directory.parent / "out") == expected, f"{path}: bit {bit} of byte {at}"
        except MixtralError as error:
            refused += 1
            assert str(directory) in str(error), error
            assert list(directory.parent.iterdir()) == [directory]
    assert refused >= 10, "most of a structure is padding?"


@pytest.mark.parametrize("combine", [True, False], ids=["joined", "without-isal"])
@pytest.mark.parametrize(("name", "pattern"), [("bin", "*.bin"), ("ranks", "release/*/*.pt"),
                                               ("dist", "release/*.distcp")])
def test_a_flipped_bit_of_a_weight_is_refused(originals, tmp_path, monkeypatch, name, pattern, combine):
    """However its storage is cut for the target: into Hugging Face tensors, columns, rows, experts left out."""
    if not combine:
        monkeypatch.setattr(sums, "crc32_combine", None)
    draw = random.Random(2)
    for number in range(12):
        directory = Path(shutil.copytree(originals[name], tmp_path / str(number) / name))
        path = draw.choice(sorted(directory.glob(pattern)))
        data = bytearray(path.read_bytes())
        at, bit = draw.choice(payload(path)), draw.randrange(8)
        data[at] ^= 1 << bit
        path.write_bytes(data)
        out = directory.parent / "out"
        sink = draw.choice([HFSink(out), RankDirSink(out, ParallelLayout(tp=1, pp=2)), DistSink(out),
                            RankDirSink(out, ParallelLayout(tp=2), vocab_divisible_by=16)])
        with pytest.raises(MixtralError, match="is not what was saved|hold different values") as error:
            convert(open_source(directory), sink)
        assert str(path) in str(error.value), f"bit {bit} of byte {at}: {error.value}"
        assert list(directory.parent.iterdir()) == [directory]
        assert (problem := inspect(directory, deep=True).problem) and str(path) in problem


def test_archives_without_sums_are_read():
    """`torch.serialization.set_crc32_options(False)` writes 0; zip's own reader refuses most of such files."""
    file = sums.Sums()
    file.expect(0, 4, 0, "storage 0")
    file.note(0, 4, 1)
    file.check("x", None)


@pytest.mark.parametrize("bit", range(32))
def test_a_storage_moved_by_its_header_is_refused(originals, tmp_path, bit):
    """The two lengths at the end of an entry's local header, which say where the data begin and have no checksum."""
    directory = Path(shutil.copytree(originals["ranks"], tmp_path / "ranks"))
    path = directory / "release" / "mp_rank_01_001_001" / "model_optim_rng.pt"
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        data[archive.getinfo("archive/data/3").header_offset + 26 + bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    with pytest.raises(MixtralError, match="lies elsewhere") as error:
        export(directory, tmp_path / "out")
    assert str(path) in str(error.value) and list(tmp_path.iterdir()) == [directory]
