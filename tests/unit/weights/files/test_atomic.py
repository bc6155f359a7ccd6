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


def test_the_end_of_one_run_leaves_the_next_ones_work(tmp_path, monkeypatch):
    """A run that begins while another one still removes what it replaced is refused, and loses nothing later."""
    target, refused, remove = tmp_path / "out", [], atomic.shutil.rmtree
    write(target)

    def begin_another(path, *args, **options):
        if Path(path).name == ".out.replaced":
            with pytest.raises(CheckpointError, match="another conversion"):
                write(target, replace=True)
            refused.append(path)
        remove(path, *args, **options)

    monkeypatch.setattr(atomic.shutil, "rmtree", begin_another)
    write(target, replace=True)
    assert len(refused) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_on_a_directory_that_is_no_longer_there_is_no_lock(tmp_path, monkeypatch):
    """The other run ended between this one's opening and locking of the temporary directory."""
    opened = os.open

    def end_of_another(path, *args, **options):
        handle = opened(path, *args, **options)
        if Path(path).name == ".out.partial":
            Path(path).rmdir()
            Path(path).mkdir()
            (Path(path) / "work").write_text("of a third run")
        return handle

    monkeypatch.setattr(os, "open", end_of_another)
    with pytest.raises(CheckpointError, match="another conversion"):
        write(tmp_path / "out")
    assert (tmp_path / ".out.partial" / "work").exists()
