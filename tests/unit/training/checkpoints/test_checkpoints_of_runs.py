"""Names below --save, sums, and the sentences of a resumed run; and failures of the small files of a save."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks

from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.training.checkpoints import directory as retention
from megatron_mixtral.training.checkpoints import integrity as manifest
from megatron_mixtral.training.checkpoints import resume

# -- names and retention -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "multiples", "in_use", "expected"), [
    (None, None, (), []),
    (1, None, (), [10, 20, 30]),
    (2, None, (), [10, 20]),
    (9, None, (), []),
    (2, 20, (), [10]),
    (None, 20, (), [10, 30]),  # the engine's --save-retain-interval: the latest, and the multiples
    (1, None, (20,), [10, 30]),
])
def test_which_checkpoints_go(limit: int | None, multiples: int | None, in_use: tuple[int, ...],
                              expected: list[int]) -> None:
    assert retention.surplus([10, 20, 30, 40], 40, limit, multiples, in_use) == expected


def test_later_checkpoints_of_a_run_taken_back_stay() -> None:
    assert retention.surplus([10, 20, 30, 40], 20, 1, None) == [10]


def drafted(save: Path, iteration: int, contents: str = "new") -> Path:
    folder = retention.draft(save, iteration)
    (folder / retention.name_of(iteration) / "__0_0.distcp").write_text(contents)
    return folder


def test_published_whole_and_last_of_all_the_tracker(tmp_path: Path) -> None:
    published = retention.publish(drafted(tmp_path, 7), tmp_path, 7)
    assert published == tmp_path / "iter_0000007"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000007", retention.TRACKER]
    assert (tmp_path / retention.TRACKER).read_text() == "7"
    retention.publish(drafted(tmp_path, 7, "newer"), tmp_path, 7)
    assert (published / "__0_0.distcp").read_text() == "newer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000007", retention.TRACKER]


class Killed(BaseException):
    pass


def test_killed_before_the_first_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first checkpoint has its name and there is no tracker yet: it is found, and then named."""
    folder, rename = drafted(tmp_path, 7), Path.rename

    def killed_at_the_tracker(self: Path, target: Path) -> Path:
        if self.name == retention.TRACKER and self.parent == folder:
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed_at_the_tracker)
    with pytest.raises(Killed):
        retention.publish(folder, tmp_path, 7)
    monkeypatch.undo()
    assert not (tmp_path / retention.TRACKER).exists()
    assert retention.unfinished(tmp_path) == (folder / retention.TRACKER, "iter_0000007")
    retention.tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000007", retention.TRACKER]
    assert (tmp_path / retention.TRACKER).read_text() == "7" and retention.unfinished(tmp_path) is None


def test_a_draft_that_never_got_its_name_names_nothing(tmp_path: Path) -> None:
    retention.publish(drafted(tmp_path, 5), tmp_path, 5)
    folder = drafted(tmp_path, 7)
    assert retention.unfinished(tmp_path) is None
    (folder / retention.TRACKER).write_text("7")  # killed before the first rename
    assert retention.unfinished(tmp_path) is None
    retention.tidy(tmp_path)
    assert (tmp_path / retention.TRACKER).read_text() == "5" and retention.iterations(tmp_path) == [5]


@pytest.mark.parametrize("at", range(4))
def test_killed_between_any_two_renames(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving iteration 7 again: whatever rename was the last, the tracker names a whole checkpoint after `tidy`."""
    retention.publish(drafted(tmp_path, 5, "old"), tmp_path, 5)
    retention.publish(drafted(tmp_path, 7, "old"), tmp_path, 7)
    done = 0
    rename = Path.rename

    def counted(self: Path, target: Path) -> Path:
        nonlocal done
        if done == at:
            raise Killed
        done += 1
        return rename(self, target)

    folder = drafted(tmp_path, 7)
    monkeypatch.setattr(Path, "rename", counted)
    try:
        retention.publish(folder, tmp_path, 7)
    except Killed:
        assert at < 3, "a publication is three renames"
    monkeypatch.undo()
    retention.tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000005", "iter_0000007", retention.TRACKER]
    found = (tmp_path / "iter_0000007" / "__0_0.distcp").read_text()
    assert found == ("old" if at < 2 else "new") and (tmp_path / retention.TRACKER).read_text() == "7"


@pytest.mark.parametrize("at", range(2))
def test_killed_before_a_new_checkpoint_has_its_name(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tracker names one that is whole, without any tidying: another program may read it meanwhile."""
    retention.publish(drafted(tmp_path, 5), tmp_path, 5)
    folder, done, rename = drafted(tmp_path, 7), [], Path.rename

    def counted(self: Path, target: Path) -> Path:
        if len(done) == at:
            raise Killed
        done.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", counted)
    with pytest.raises(Killed):
        retention.publish(folder, tmp_path, 7)
    monkeypatch.undo()
    assert (tmp_path / retention.TRACKER).read_text() == "5"
    assert retention.iterations(tmp_path) == ([5], [5, 7])[at]


def test_a_removed_checkpoint_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retention.publish(drafted(tmp_path, 5), tmp_path, 5)
    monkeypatch.setattr(retention.shutil, "rmtree", lambda *args, **kwargs: None)  # killed before it
    retention.remove(tmp_path, 5)
    monkeypatch.undo()
    assert retention.iterations(tmp_path) == []
    retention.tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [retention.TRACKER]


def test_a_linked_checkpoint_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "iter_0000005").symlink_to(tmp_path / "elsewhere")
    retention.remove(tmp_path, 5)
    assert retention.iterations(tmp_path) == [5]


# -- sums ------------------------------------------------------------------------------------------------


def test_sums_of_the_ranks_are_joined_and_the_rest_is_summed(tmp_path: Path) -> None:
    folder = retention.draft(tmp_path, 3)
    directory = folder / "iter_0000003"
    for name in ("__0_0.distcp", "__1_0.distcp", "__10_0.distcp", ".metadata"):
        (directory / name).write_text(f"contents of {name}")
    for rank in (0, 1):
        manifest.sum_share(directory, rank)
    assert set(json.loads((folder / "sums.1").read_text())) == {"__1_0.distcp"}
    manifest.write_manifest(directory)
    sums = manifest.read_manifest(directory)
    assert set(sums) == {"__0_0.distcp", "__1_0.distcp", "__10_0.distcp", ".metadata"}
    assert [manifest.damage(directory, sums, rank, 3) for rank in range(3)] == [[], [], []]
    (directory / "__10_0.distcp").write_text("other")
    (directory / ".metadata").unlink()
    found = sorted(problem for rank in range(3) for problem in manifest.damage(directory, sums, rank, 3))
    assert found[0] == ".metadata cannot be read (No such file or directory)"
    assert found[1].startswith("__10_0.distcp has sha256 ")


def test_no_sums_are_no_damage_but_an_unreadable_file_of_sums_is(tmp_path: Path) -> None:
    with pytest.raises(manifest.NoSumsError, match=r"has no integrity.json, so there is nothing to compare"):
        manifest.read_manifest(tmp_path)
    (tmp_path / manifest.MANIFEST).write_text('{"algorithm": "crc32", "files": {}}')
    with pytest.raises(manifest.NoSumsError, match="has sums by 'crc32', expected 'sha256'"):
        manifest.read_manifest(tmp_path)
    (tmp_path / manifest.MANIFEST).write_text('{"algorithm": "sha')
    with pytest.raises(CheckpointError, match="cannot be read: .*--no-verify-checkpoint") as caught:
        manifest.read_manifest(tmp_path)
    assert not isinstance(caught.value, manifest.NoSumsError)


# -- sentences -------------------------------------------------------------------------------------------


def arguments(**changed: Any) -> Namespace:
    return Namespace(**({
        "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": 1, "expert_tensor_parallel_size": 2, "context_parallel_size": 1,
        "data_parallel_size": 2, "global_batch_size": 8, "seq_length": 32, "consumed_train_samples": 80,
        "train_iters": 100, "train_samples": None, "lr_decay_iters": None, "lr_decay_samples": None,
        "data_path": ["a"], "split": None, "seed": 1, "override_opt_param_scheduler": False,
        "use_checkpoint_opt_param_scheduler": False, "finetune": False, "no_load_optim": False} | changed))


def test_what_changed_is_said() -> None:
    assert resume.differences(arguments(), arguments()) == []
    now = arguments(tensor_model_parallel_size=1, expert_tensor_parallel_size=1, data_parallel_size=4,
                    global_batch_size=16, seq_length=64, data_path=["0.5", "a", "0.5", "b"])
    layout, batch, length, data = resume.differences(arguments(), now)
    assert layout == "the layout was tp2 etp2 dp2, now it is dp4"
    assert "was 8, now it is 16: the data go on after sample 80" in batch
    assert "was 32, now it is 64" in length
    assert data == "--data-path was a, now it is 0.5 a 0.5 b: other samples, of which 80 are skipped"
    converted = arguments(data_parallel_size=None)
    assert resume.differences(converted, arguments()) == []
    assert resume.differences(converted, arguments(pipeline_model_parallel_size=2)) == [
        "the layout was tp2 etp2, now it is tp2 pp2 etp2"]
    for saved, now in ((arguments(no_save_optim=True), arguments()), (arguments(), arguments(no_load_optim=True))):
        [optimizer] = resume.differences(saved, now)
        assert "the learning-rate schedule begins anew, with its warm-up; the data go on after sample 80" in optimizer


def test_a_schedule_of_another_length_needs_a_decision() -> None:
    with pytest.raises(ConfigError, match=r"800 samples long \(100 steps x 8\), now it would be 1600 \(100 x 16\)"):
        resume.check_schedule(arguments(), arguments(global_batch_size=16))
    for allowed in (arguments(global_batch_size=16, train_iters=50), arguments(train_iters=200, lr_decay_iters=100),
                    arguments(global_batch_size=16, override_opt_param_scheduler=True),
                    arguments(global_batch_size=16, use_checkpoint_opt_param_scheduler=True)):
        resume.check_schedule(arguments(), allowed)


def test_a_length_that_was_given_is_followed_and_a_warm_up_of_another_batch_is_not() -> None:
    resume.check_schedule(arguments(), arguments(lr_decay_iters=50), length_given=True)
    with pytest.raises(ConfigError, match="now it would be 400"):
        resume.check_schedule(arguments(), arguments(lr_decay_iters=50))
    with pytest.raises(ConfigError, match="now it would be 1600"):  # the flag is what it was, the batch is not
        resume.check_schedule(*(arguments(lr_decay_iters=100, global_batch_size=size) for size in (8, 16)),
                              length_given=True)
    before, after = arguments(lr_warmup_iters=10), arguments(lr_warmup_iters=10, global_batch_size=16, train_iters=50)
    with pytest.raises(ConfigError, match=r"warm-up was 80 samples long \(10 steps x 8\), now .* 160 \(10 x 16"):
        resume.check_schedule(before, after)
    resume.check_schedule(before, arguments(lr_warmup_iters=5, global_batch_size=16, train_iters=50))
    resume.check_schedule(before, arguments(lr_warmup_iters=3))


def test_settings_that_changed_are_said() -> None:
    saved = arguments(lr=3e-3, adam_eps=1e-8, weight_decay=0.1, start_weight_decay=0.1, data_identity={"a": "9 tokens"})
    now = {"lr": 1e-3, "adam_eps": 1e-6, "weight_decay": 0.2, "start_weight_decay": 0.2, "data_identity": {"a": "8 t"}}
    settings, data = resume.differences(saved, arguments(**now))
    assert settings == ("the optimizer goes on with the settings of the flags: --lr was 0.003, now it is 0.001; "
                        "--weight-decay was 0.1, now it is 0.2; --adam-eps was 1e-08, now it is 1e-06")
    assert data == ("the data set a was written again with other contents (it was 9 tokens, now it is 8 t): other "
                    "samples, of which 80 are skipped")
    followed, kept, _ = resume.differences(saved, arguments(**now, use_checkpoint_opt_param_scheduler=True))
    assert followed.endswith("flags: --adam-eps was 1e-08, now it is 1e-06")
    assert kept == "--use-checkpoint-opt_param-scheduler keeps --lr 0.003 (not 0.001), --weight-decay 0.1 (not 0.2)"


def test_momentum_that_is_not_in_the_checkpoint_is_refused() -> None:
    saved, now = (arguments(optimizer="sgd", sgd_momentum=momentum) for momentum in (0.0, 0.9))
    with pytest.raises(ConfigError, match="holds no momentum, this run has 0.9: give 0"):
        resume.check_optimizer(saved, now)
    resume.check_optimizer(now, saved)


def test_another_kind_of_optimizer_needs_a_decision() -> None:
    saved = arguments(use_distributed_optimizer=True, optimizer="adam")
    resume.check_optimizer(saved, saved)
    now = arguments(use_distributed_optimizer=False, optimizer="adam")
    with pytest.raises(ConfigError, match=r"with --use-distributed-optimizer, this run is without it.*add it to go on"):
        resume.check_optimizer(saved, now)
    with pytest.raises(ConfigError, match=r"without --use-distributed-optimizer, this run is with it.*leave it out"):
        resume.check_optimizer(now, saved)
    with pytest.raises(ConfigError, match="the state of --optimizer adam, the run's is sgd"):
        resume.check_optimizer(saved, arguments(use_distributed_optimizer=True, optimizer="sgd"))
    resume.check_optimizer(saved, arguments(use_distributed_optimizer=False, optimizer="adam", no_load_optim=True))
    resume.check_optimizer(Namespace(), now)  # converted weights


# -- a save that cannot begin ------------------------------------------------------------------------------


def _cannot_begin(rank: int, save: str) -> tuple[Path | None, str | None, list[str]]:
    """Begin a save where the directory has become a file: (draft, what the manager remembers, what it says)."""
    import logging

    from megatron_mixtral.training.checkpoints import manager as module

    manager = module.CheckpointManager(Namespace(save=save, rank=0, save_retain_interval=None, hf_checkpoint=None,
                                                 export_hf_interval=None, load=None, adapter_format="per-expert"))
    Path(save).rmdir()
    Path(save).touch()
    said: list[str] = []
    module.logger.addHandler(handler := logging.Handler())
    handler.emit = lambda record: said.append(record.getMessage())
    return manager.begin(3), manager.unsaved, said


def test_a_save_that_cannot_begin_is_reported(tmp_path: Path) -> None:
    [(draft, unsaved, said)] = run_ranks(1, _cannot_begin, str(tmp_path / "save"))
    assert draft is None and "the checkpoint of step 3 could not be saved: [Errno 17]" in unsaved
    assert len(said) == 1 and said[0].startswith(unsaved) and said[0].endswith("nothing is saved yet")


def _loses_its_directory(rank: int, save: str) -> list[str]:
    """What each rank is told, at the end of a save and at the beginning of another, once another run has the lease."""
    from megatron_mixtral.training.checkpoints import lease
    from megatron_mixtral.training.checkpoints.manager import CheckpointManager

    held = lease.acquire(Path(save), lease.this_process({})) if rank == 0 else None
    manager = CheckpointManager(Namespace(save=save, load=None, rank=rank, save_retain_interval=None,
                                          hf_checkpoint=None, export_hf_interval=None,
                                          adapter_format="per-expert"), held)
    folder = manager.begin(2)
    if held is not None:
        (Path(save) / lease.NAME).unlink()
        (Path(save) / lease.NAME).write_text("another run's")
    told = []
    for act in (lambda: manager.end(2, folder, None, background=True), lambda: manager.begin(3)):
        with pytest.raises(CheckpointError) as raised:
            act()
        told.append(str(raised.value))
    if held is not None:
        held.release()
    return told


def test_a_run_that_lost_its_directory_saves_nothing_more(tmp_path: Path) -> None:
    first, second = run_ranks(2, _loses_its_directory, str(tmp_path))
    assert first == second and all("is no longer this run's" in sentence for sentence in first)
    assert retention.iterations(tmp_path) == [] and (tmp_path / ".lease").read_text() == "another run's"


def test_the_first_tokenizer_that_is_there_goes_along_and_is_not_replaced(tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hf", "flag", "save"):
        (tmp_path / name).mkdir()
    for name in ("tokenizer.model", "generation_config.json"):
        (tmp_path / "hf" / name).write_text(name)
        (tmp_path / "flag" / name).write_text("another")
    monkeypatch.chdir(tmp_path / "flag")  # a name of the hub is no folder: nothing is taken from here
    retention.carry_tokenizer(tmp_path / "save", [None, "nowhere"])
    assert not list((tmp_path / "save").iterdir())
    retention.carry_tokenizer(tmp_path / "save", ["org/name", str(tmp_path / "hf" / "tokenizer.model")])
    retention.carry_tokenizer(tmp_path / "save", [str(tmp_path / "flag")])
    assert {path.name: path.read_text() for path in (tmp_path / "save").iterdir()} == {
        name: name for name in ("tokenizer.model", "generation_config.json")}
