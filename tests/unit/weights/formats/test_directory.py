"""Names in a Megatron checkpoint directory, and which of its iterations is meant."""

from pathlib import Path

import pytest

from megatron_mixtral.config import preset
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights import directory


@pytest.mark.parametrize(("iteration", "name"), [(0, "iter_0000000"), (12, "iter_0000012"), (10**8, "iter_100000000")])
def test_names_of_iterations_are_the_engines(iteration: int, name: str) -> None:
    assert directory.name_of(iteration) == name and directory.iteration_of(name) == iteration


def test_other_names_are_no_iterations(tmp_path: Path) -> None:
    for name in ("release", "iter_", "iter_12", "iter_0000012.old", ".iter_0000012"):
        assert directory.iteration_of(name) is None
        (tmp_path / name).mkdir()
    for iteration in (300, 20):
        (tmp_path / directory.name_of(iteration)).mkdir()
    assert directory.iterations(tmp_path) == [20, 300] and directory.iterations(tmp_path / "absent") == []
    assert directory.name_of(None) == directory.RELEASE == "release"


def test_the_tracker_says_which_iteration_is_meant(tmp_path: Path) -> None:
    tracker, target = tmp_path / directory.TRACKER, tmp_path / "iter_0000012"
    assert not directory.is_checkpoint(tmp_path) and directory.latest(tmp_path) is None
    assert directory.iteration_directory(target) == (tmp_path, target)
    tracker.write_text("12\n")
    assert directory.is_checkpoint(tmp_path) and directory.latest(tmp_path) == "iter_0000012"
    with pytest.raises(CheckpointError, match="iter_0000012, which does not exist"):
        directory.iteration_directory(tmp_path)
    target.mkdir()
    assert directory.iteration_directory(tmp_path) == (tmp_path, target)
    tracker.write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="expected 'release' or an iteration number, found '../elsewhere'"):
        directory.latest(tmp_path)


def test_what_is_written_beside_an_iteration_is_read_back(tmp_path: Path) -> None:
    assert directory.identity(tmp_path) is None
    for iteration, name in ((None, "release"), (7, "iter_0000007")):
        for file, contents in directory.identity_files(preset("tiny"), iteration).items():
            (tmp_path / file).write_bytes(contents)
        assert directory.identity(tmp_path) == preset("tiny") and directory.latest(tmp_path) == name
