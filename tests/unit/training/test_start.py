"""Where a run's weights come from, and that what names weights and holds none is refused."""

from pathlib import Path

import pytest

from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.training.flags import EngineFlags, Flags
from megatron_mixtral.training.start import weights_of
from megatron_mixtral.weights import directory


def run_with(tmp_path: Path, *steps: int, tracker: str | None = None) -> Path:
    """A directory with checkpoints of some steps."""
    folder = tmp_path / "run"
    for step in steps:
        (folder / directory.name_of(step)).mkdir(parents=True)
    folder.mkdir(parents=True, exist_ok=True)
    if tracker is not None:
        (folder / directory.TRACKER).write_text(tracker)
    return folder


def start(**given: object) -> tuple[str, bool]:
    ours = {"hf_checkpoint": given.pop("hf_checkpoint", None)}
    return weights_of(Flags(**ours), EngineFlags(**{name: str(value) if isinstance(value, Path) else value
                                                    for name, value in given.items()}))


def test_the_first_start_of_a_run_finds_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", run_with(tmp_path)):
        assert start(load=folder, save=folder) == ("random weights", False)
        assert start(load=folder, save=folder, hf_checkpoint="hf") == ("Hugging Face weights hf", True)
    assert start() == ("random weights", False)


def test_a_run_does_not_overwrite_checkpoints_that_it_does_not_go_on_from(tmp_path: Path) -> None:
    (tmp_path / "iter_0000004").mkdir()
    with pytest.raises(ConfigError, match=r"--save .* holds checkpoints already, the last is iter_0000004.*add --load"):
        start(save=tmp_path)


def test_its_own_checkpoint_comes_first(tmp_path: Path) -> None:
    folder = run_with(tmp_path, 2, 4, tracker="4")
    for more in ({}, {"hf_checkpoint": "hf"}, {"pretrained_checkpoint": tmp_path / "absent"}, {"finetune": True},
                 {"ckpt_step": 2}, {"save": folder}):
        assert start(load=folder, **more) == (f"checkpoint {folder}", False)
    assert start(load=tmp_path / "absent", pretrained_checkpoint=folder) == (f"checkpoint {folder}", False)
    released = run_with(tmp_path / "other", tracker="release")
    (released / "release").mkdir()
    assert "converted, without an optimizer" in start(pretrained_checkpoint=released)[0]


@pytest.mark.parametrize("hf", [None, "hf"])
def test_checkpoints_without_a_tracker_are_neither_ignored_nor_overwritten(hf: str | None, tmp_path: Path) -> None:
    folder = run_with(tmp_path, 2, 4)
    with pytest.raises(CheckpointError, match="has checkpoints, but no .* there are 2 and 4: write"):
        start(load=folder, save=folder, hf_checkpoint=hf)
    for text in ("", "garbage"):
        (folder / directory.TRACKER).write_text(text)
        with pytest.raises(CheckpointError, match="expected 'release' or an iteration number.* there are 2 and 4"):
            start(load=folder, save=folder, hf_checkpoint=hf)


def test_a_run_killed_before_its_first_tracker_goes_on(tmp_path: Path) -> None:
    folder = run_with(tmp_path, 2)
    draft = folder / ".saving-x7k2"
    draft.mkdir()
    (draft / directory.TRACKER).write_text("2")
    assert start(load=folder, save=folder, hf_checkpoint="hf") == (f"checkpoint {folder}", False)
    assert not (folder / directory.TRACKER).exists(), "to look changes nothing"


@pytest.mark.parametrize("flag", ["load", "pretrained_checkpoint"])
def test_folders_that_are_no_checkpoints_are_named(flag: str, tmp_path: Path) -> None:
    folder, spelled = run_with(tmp_path, 2, 4, tracker="4"), f"--{flag.replace('_', '-')}"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    hf = tmp_path / "hf"
    hf.mkdir()
    for name in ("config.json", "model.safetensors"):
        (hf / name).touch()
    for path, sentence in ((tmp_path / "empty", "there are no checkpoints in"), (tmp_path / "no", "is not there"),
                           (tmp_path / "file", "is a file; expected the directory"),
                           (hf, f"a Hugging Face model: give it as --hf-checkpoint {hf}"),
                           (folder / "iter_0000002", f"give {spelled} {folder} --ckpt-step 2"),
                           (folder / "iter_0000003", "there is no iter_0000003 in .*; there are 2 and 4")):
        with pytest.raises(CheckpointError, match=sentence) as caught:
            start(**{flag: path})
        assert spelled in str(caught.value) or "iter_0000003" in str(caught.value)


def test_wrong_folders_do_not_mean_random_weights(tmp_path: Path) -> None:
    folder = tmp_path / "wrong"
    with pytest.raises(CheckpointError, match=r"--finetune --load .* random weights: .*, or drop --finetune"):
        start(load=folder, save=folder, finetune=True)
    with pytest.raises(CheckpointError, match=r"--load .* random weights: .*, or drop --load"):
        start(load=folder, save=tmp_path / "other")
    with pytest.raises(CheckpointError, match="--ckpt-step 3: .*wrong is not there"):
        start(load=folder, save=folder, ckpt_step=3, hf_checkpoint="hf")
    with pytest.raises(CheckpointError, match="--ckpt-step 3: there is no iter_0000003 in .*; there are 2 and 4"):
        start(load=run_with(tmp_path, 2, 4, tracker="4"), ckpt_step=3)
    with pytest.raises(ConfigError, match="both give starting weights"):
        start(hf_checkpoint="hf", pretrained_checkpoint=folder)
