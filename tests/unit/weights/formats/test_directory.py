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
    with pytest.raises(CheckpointError, match="there is no iter_0000012 in .*; there are no checkpoints in "):
        directory.iteration_directory(target)
    tracker.write_text("12\n")
    assert directory.is_checkpoint(tmp_path) and directory.latest(tmp_path) == "iter_0000012"
    with pytest.raises(CheckpointError, match="iter_0000012, which does not exist"):
        directory.iteration_directory(tmp_path)
    target.mkdir()
    assert directory.iteration_directory(tmp_path) == directory.iteration_directory(target) == (tmp_path, target)
    tracker.write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="expected 'release' or an iteration number, found '../elsewhere'"):
        directory.latest(tmp_path)


@pytest.mark.parametrize("text", ["", "\0\x9c\xff", "-1", "12 13", "\u0664", "iter_0000012"])
def test_a_tracker_that_names_nothing_is_refused(text: str, tmp_path: Path) -> None:
    for iteration in (2, 4):
        (tmp_path / directory.name_of(iteration)).mkdir()
    (tmp_path / directory.TRACKER).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="expected 'release' or an iteration number, found .*there are 2 and 4: "):
        directory.chosen(tmp_path)


def test_what_is_there_is_said(tmp_path: Path) -> None:
    for iterations, said in (((), f"there are no checkpoints in {tmp_path}"), ((4,), "there is 4"),
                             ((2, 6), "there are 2, 4 and 6"), ((8, 10, 12, 14), "there are 2, 4, ..., 10, 12 and 14")):
        for iteration in iterations:
            (tmp_path / directory.name_of(iteration)).mkdir()
        assert directory.what_is_there(tmp_path) == said
    (tmp_path / "file").touch()
    assert directory.what_is_there(tmp_path / "file").endswith("is a file")
    assert directory.what_is_there(tmp_path / "absent").endswith("is not there")


def test_which_iteration_is_chosen(tmp_path: Path) -> None:
    assert directory.chosen(tmp_path) is None and directory.chosen(tmp_path / "absent") is None
    for iteration in (2, 4):
        (tmp_path / directory.name_of(iteration)).mkdir()
    with pytest.raises(CheckpointError, match="has checkpoints, but no .*; there are 2 and 4: write into this file"):
        directory.chosen(tmp_path)
    assert directory.chosen(tmp_path, name="iter_0000004") == "iter_0000004"
    (tmp_path / directory.TRACKER).write_text("4")
    assert (directory.chosen(tmp_path), directory.chosen(tmp_path, 2)) == ("iter_0000004", "iter_0000002")
    with pytest.raises(CheckpointError, match=r"--ckpt-step 3: there is no iter_0000003 in .*; there are 2 and 4"):
        directory.chosen(tmp_path, 3)
    (tmp_path / directory.TRACKER).write_text("5")
    with pytest.raises(CheckpointError, match="iter_0000005, which does not exist; there are 2 and 4"):
        directory.chosen(tmp_path)
    (tmp_path / directory.TRACKER).write_text("release")
    with pytest.raises(CheckpointError, match="--ckpt-step 2: .* means converted weights"):
        directory.chosen(tmp_path, 2)


def test_what_is_written_beside_an_iteration_is_read_back(tmp_path: Path) -> None:
    assert directory.identity(tmp_path) is None
    for iteration, name in ((None, "release"), (7, "iter_0000007")):
        for file, contents in directory.identity_files(preset("tiny"), iteration).items():
            (tmp_path / file).write_bytes(contents)
        assert directory.identity(tmp_path) == preset("tiny") and directory.latest(tmp_path) == name
