"""Writing a directory whole beside others: names that somebody else put there, and two writers at once."""

import os
from pathlib import Path

import pytest

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.files import atomic


def write(target: Path, replace: bool = False) -> None:
    atomic.refuse_existing(target, replace)
    with atomic.staged(target, replace) as stage:
        stage.begin("plan")
        (stage.root / "weights").write_text("new")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A directory with something precious, outside of where is written."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "precious").write_text("x")
    (tmp_path / "shared").mkdir()
    return tmp_path / "victim"


@pytest.mark.parametrize("name", [".out.partial", ".out.replaced", "out"])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_in_the_way_is_refused_and_not_followed(victim, name, dangling):
    shared = victim.parent / "shared"
    link = shared / name
    link.symlink_to(victim / "absent" if dangling else victim)
    with pytest.raises(CheckpointError, match="is a symbolic link") as error:
        write(shared / "out", replace=True)
    assert str(link) in str(error.value)
    assert [path.name for path in victim.iterdir()] == ["precious"]
    assert list(shared.iterdir()) == [link] and link.is_symlink()


def test_a_link_within_the_rest_of_a_killed_run_is_removed_and_not_followed(victim):
    partial = victim.parent / "shared" / ".out.partial"
    partial.mkdir()
    (partial / "release").symlink_to(victim)
    write(victim.parent / "shared" / "out")
    assert (victim / "precious").exists() and not (victim.parent / "shared" / "out" / "release").is_symlink()


def test_a_temporary_directory_of_another_user_is_refused(victim, monkeypatch):
    partial = victim.parent / "shared" / ".out.partial"
    partial.mkdir()
    (partial / "theirs").write_text("x")
    monkeypatch.setattr(os, "geteuid", lambda: partial.stat().st_uid + 1)
    with pytest.raises(CheckpointError, match="belongs to another user") as error:
        write(victim.parent / "shared" / "out")
    assert str(partial) in str(error.value) and (partial / "theirs").exists()
