"""The Python way in: sources and sinks by name, plans that change nothing, and what the doors offer."""

import importlib
from pathlib import Path

import pytest
import torch
from helpers.models import TINY, assert_same_weights, random_hf_directory

from megatron_mixtral.config import MixtralConfig, ParallelLayout
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.weights import convert, directory, hf_tensors, open_sink, open_source
from megatron_mixtral.weights.formats import DistSource, HFSource, RankDirSource

ROOMS = ("weights", "weights.files", "weights.formats", "weights.edits")
SOURCES = {"huggingface": HFSource, "torch": RankDirSource, "torch_dist": DistSource}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_hf_directory(tmp_path_factory.mktemp("hf") / "hf", MixtralConfig(**TINY), torch.bfloat16)


@pytest.mark.parametrize("name", ROOMS)
def test_a_door_offers_at_most_ten_names_and_gives_them(name: str) -> None:
    room = importlib.import_module(f"megatron_mixtral.{name}")
    assert 1 <= len(room.__all__) <= 10
    assert all(getattr(room, offered) is not None for offered in room.__all__)
    with pytest.raises(AttributeError, match="offers"):
        _ = room.no_such_name


@pytest.mark.parametrize("form", SOURCES)
def test_every_format_is_written_found_and_read_back(hf: Path, tmp_path: Path, form: str) -> None:
    convert(open_source(hf), open_sink(tmp_path / "out", form, ParallelLayout(tp=2, ep=2)), verify=True)
    found = open_source(tmp_path / "out")
    assert isinstance(found, SOURCES[form])
    convert(found, open_sink(tmp_path / "back"))
    assert_same_weights(hf, tmp_path / "back")


@pytest.mark.parametrize("form", SOURCES)
def test_planning_changes_nothing(hf: Path, tmp_path: Path, form: str) -> None:
    """One sink plans for one source after the other, and each time as if it were the first."""
    source, sink = open_source(hf), open_sink(tmp_path / "out", form)
    small = open_source(random_hf_directory(tmp_path / "small", MixtralConfig(**TINY | {"num_hidden_layers": 2})))
    plans = []
    for one in (source, small, source):
        one.check()
        plans.append(sink.plan(one, {name: one.dtype(tensor) for name, tensor in hf_tensors(one.config).items()}))
    first, other, again = plans
    assert first.beside == again.beside != other.beside
    assert first.size == again.size > 0 and first.files.keys() == again.files.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_an_iteration_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    for iteration in (2, 4):
        (tmp_path / directory.name_of(iteration)).mkdir()
    for source in (open_source, DistSource, RankDirSource):
        with pytest.raises(CheckpointError, match="there is no iter_0000003 in .*; there are 2 and 4"):
            source(tmp_path / "iter_0000003")
        with pytest.raises(CheckpointError, match="but no latest_checkpointed_iteration.txt .* there are 2 and 4"):
            source(tmp_path)


def test_what_is_neither_a_format_nor_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'zarr': expected one of huggingface, torch, torch_dist"):
        open_sink(tmp_path / "out", "zarr")
    with pytest.raises(CheckpointError, match="does not exist or is not a directory"):
        open_source(tmp_path / "absent")


def test_a_hugging_face_folder_without_weights_says_what_it_lacks(hf: Path, tmp_path: Path) -> None:
    """Not that it is no Megatron checkpoint."""
    (tmp_path / "config.json").write_bytes((hf / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="safetensors"):
        open_source(tmp_path)
