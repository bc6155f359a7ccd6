"""What a run leaves on the disk: whole checkpoints, summed, the last few, exported; also when it ends early."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import datasets
from helpers.events import until
from helpers.models import assert_same_weights, tiny_hf_mixtral
from helpers.program import Halt, Outcome, Running, pretrain
from helpers.ranks import run_ranks

from megatron_mixtral.training.checkpoints import directory as retention
from megatron_mixtral.training.checkpoints import integrity as manifest
from megatron_mixtral.weights import cli

SEQUENCE, BATCH, STEPS = 32, 4, 6
LAYOUT = ["--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2", "--expert-tensor-parallel-size",
          "1"]
RECIPE = ["--seq-length", str(SEQUENCE), "--micro-batch-size", "1", "--global-batch-size", str(BATCH), "--lr", "3e-3",
          "--lr-decay-style", "constant", "--clip-grad", "1.0", "--eval-iters", "0", "--use-distributed-optimizer"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def hf(folder: Path) -> Path:
    return tiny_hf_mixtral(folder / "hf")


@pytest.fixture(scope="module")
def start(folder: Path, hf: Path) -> list[str]:
    """Everything but the layout, the length and the directories of checkpoints."""
    prefix = datasets.write_dataset(folder / "corpus_text_document", vocab_size=96)
    return [*RECIPE, "--data-path", prefix, "--split", "969, 30, 1", "--data-cache-path", str(folder / "cache"),
            "--hf-checkpoint", str(hf)]


def saving(save: Path, interval: int = 2) -> list[str]:
    return ["--save", str(save), "--load", str(save), "--save-interval", str(interval)]


def run(start: list[str], place: Path, *flags: str, interval: int = 2) -> Outcome:
    argv = [*LAYOUT, *start, *saving(place / "save", interval), "--train-iters", str(STEPS), *flags]
    outcome = pretrain(2, argv, place)
    assert outcome.codes == [0, 0], outcome.logs[0][-3000:]
    return outcome


def names(save: Path) -> list[str]:
    """What is in it, but the logs of its starts and what of the model's tokenizer goes along."""
    return sorted(path.name for path in save.iterdir() if path.name not in ("logs", "generation_config.json"))


@pytest.fixture(scope="module")
def kept(start: list[str], folder: Path) -> tuple[Outcome, Path]:
    """Six steps, saved every second, the last two kept, the fourth exported."""
    place = folder / "kept"
    return run(start, place, "--save-total-limit", "2", "--export-hf-interval", "4"), place / "save"


def test_the_last_checkpoints_are_there_and_nothing_else(kept: tuple[Outcome, Path]) -> None:
    _, save = kept
    assert names(save) == ["hf", "iter_0000004", "iter_0000006", retention.TRACKER, "mixtral_config.json"]
    assert (save / retention.TRACKER).read_text() == "6"


def _engine_verifies(rank: int, directory: str) -> str:
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

    try:
        verify_integrity_manifest(directory)
    except CheckpointingException as error:
        return str(error)
    return "whole"


def test_the_manifest_is_the_engines(kept: tuple[Outcome, Path], tmp_path: Path) -> None:
    """The engine's own comparison accepts it, and refuses a changed byte."""
    copy = shutil.copytree(kept[1] / "iter_0000006", tmp_path / "iter_0000006")
    assert set(manifest.read_manifest(copy)) == {".metadata", "metadata.json", "__0_0.distcp", "__1_0.distcp"}
    assert run_ranks(1, _engine_verifies, str(copy)) == ["whole"]
    _change_a_byte(copy / "__1_0.distcp")
    assert "__1_0.distcp: hash mismatch" in run_ranks(1, _engine_verifies, str(copy))[0]


def _change_a_byte(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))


def test_verified_before_it_is_loaded(kept: tuple[Outcome, Path], start: list[str], tmp_path: Path) -> None:
    save = shutil.copytree(kept[1], tmp_path / "save")
    argv = [*LAYOUT, *start, "--load", str(save), "--train-iters", str(STEPS)]
    good = pretrain(2, argv, tmp_path / "good")
    assert good.codes == [0, 0] and "4 files are as they were written" in good.logs[0]
    _change_a_byte(save / "iter_0000006" / "__1_0.distcp")
    bad = pretrain(2, argv, tmp_path / "bad")
    assert bad.codes[0] == 1 and not bad.steps
    assert re.search(r"error: .*iter_0000006 is damaged: __1_0.distcp has sha256 .*--ckpt-step", bad.logs[0])
    loaded = pretrain(2, [*argv, "--no-verify-checkpoint"], tmp_path / "loaded")
    assert loaded.codes == [0, 0] and "as they were written" not in loaded.logs[0]


def test_a_checkpoint_without_sums_is_loaded_unless_sums_are_asked_for(kept: tuple[Outcome, Path], start: list[str],
                                                                       tmp_path: Path) -> None:
    save = shutil.copytree(kept[1], tmp_path / "save")
    (save / "iter_0000006" / manifest.MANIFEST).unlink()
    argv = [*start, "--load", str(save), "--train-iters", str(STEPS)]
    loaded = pretrain(1, argv, tmp_path / "loaded")
    assert loaded.codes == [0] and "iter_0000006 has no integrity.json, so there is nothing" in loaded.logs[0]
    refused = pretrain(1, [*argv, "--verify-checkpoint"], tmp_path / "refused")
    assert refused.codes == [1] and "error: --verify-checkpoint: " in refused.logs[0]


def test_export_is_the_conversion_by_hand(kept: tuple[Outcome, Path], hf: Path, tmp_path: Path) -> None:
    cli.convert(["--loader", "mixtral_mg", "--save-model-type", "huggingface", "--load-dir",
              str(kept[1] / "iter_0000004"), "--save-dir", str(tmp_path)])
    assert_same_weights(kept[1] / "hf" / "iter_0000004", tmp_path / "mg2hg")


def test_the_same_command_twice_is_the_same_to_the_bit(kept: tuple[Outcome, Path], start: list[str],
                                                       folder: Path) -> None:
    """Also where the second saves in the background: weights, optimizer, losses and norms."""
    first, save = kept
    second = run(start, folder / "background", "--async-save", interval=3)
    assert "scheduled an async checkpoint save" in second.logs[0]
    steps = range(1, STEPS + 1)
    assert second.losses(*steps) == first.losses(*steps) and second.norms(*steps) == first.norms(*steps)
    other = folder / "background" / "save"
    assert names(other) == ["iter_0000003", "iter_0000006", retention.TRACKER, "mixtral_config.json"]
    assert run_ranks(1, _different, str(save / "iter_0000006"), str(other / "iter_0000006")) == [([], 40)]
    assert manifest.damage(other / "iter_0000003", manifest.read_manifest(other / "iter_0000003")) == []


def _different(rank: int, one: str, other: str) -> tuple[list[str], int]:
    """Names of the tensors of two distributed checkpoints that are not bit-equal, and how many there are."""
    import torch
    from megatron.core import dist_checkpointing

    first, second = (dist_checkpointing.load_plain_tensors(path) for path in (one, other))
    assert first.keys() == second.keys()
    tensors = [name for name, value in first.items() if torch.is_tensor(value)]
    return [name for name in tensors if not torch.equal(first[name], second[name])], len(tensors)


# -- an end that was not planned -------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_ends(number: int, start: list[str], tmp_path: Path) -> None:
    argv = [*LAYOUT, *start, *saving(tmp_path / "save", 10**6), "--train-iters", "10000"]
    running = Running(2, argv, tmp_path)
    until(lambda: len(running.figures()) >= 2 or not running.alive())
    running.signal(number)
    outcome = running.finish()
    assert outcome.codes == [0, 0], outcome.logs[0][-3000:]
    last = max(outcome.steps)
    assert (tmp_path / "save" / retention.TRACKER).read_text() == str(last) and last < 10000
    assert f"iter_{last:07d}" in names(tmp_path / "save")


@pytest.mark.parametrize("halt", [Halt(1, batch=0), Halt(0, batch=1)], ids=["process groups", "first step"])
def test_a_signal_before_the_first_step_ends_at_once(halt: Halt, start: list[str], tmp_path: Path) -> None:
    """The other rank is, or soon will be, inside a collective that waits for the one that stands still."""
    argv = [*LAYOUT, *start, *saving(tmp_path / "save"), "--train-iters", "1000"]
    running = Running(2, argv, tmp_path, halt=halt)
    until(lambda: running.halted() and "initializing torch distributed" in running.said(0))
    running.signal(signal.SIGTERM)
    outcome = running.finish()
    assert outcome.codes == [-signal.SIGTERM, -signal.SIGTERM] and not outcome.steps


def test_the_duration_saves_and_ends(start: list[str], tmp_path: Path) -> None:
    argv = [*start, *saving(tmp_path / "save", 1000), "--train-iters", "1000"]
    outcome = pretrain(1, [*argv, "--exit-duration-in-mins=-1"], tmp_path)  # over when the first step ends
    assert outcome.codes == [0]
    assert (tmp_path / "save" / retention.TRACKER).read_text() == str(max(outcome.steps))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB: room for two checkpoints of this model, not for four."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"a file system of its own cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("background", [[], pytest.param(["--async-save"], marks=pytest.mark.slow)],
                         ids=["save", "async save"])
def test_a_full_disk_is_reported_and_training_goes_on(background: list[str], small_disk: Path, start: list[str],
                                                      tmp_path: Path) -> None:
    save = small_disk / "save"
    argv = [*LAYOUT, *start, *saving(save), "--train-iters", "8", *background]
    full = pretrain(2, argv, tmp_path / "full")
    assert sorted(full.steps) == list(range(1, 9)), full.logs[0][-3000:]
    assert full.codes[0] == 1, "the last steps are not saved"
    assert re.search(r"the checkpoint of step \d could not be saved: .+ free on the disk\). Training goes on; the last "
                     r"whole checkpoint is that of step \d", full.logs[0])
    assert "error: the checkpoint of step 8 could not be saved" in full.logs[0]
    latest = int((save / retention.TRACKER).read_text())
    whole = retention.iterations(save)
    assert latest == whole[-1] < 8 and not [name for name in names(save) if name.startswith(".")]
    for iteration in whole:
        directory = save / retention.name_of(iteration)
        assert manifest.damage(directory, manifest.read_manifest(directory)) == []
    for iteration in whole[:-1]:
        shutil.rmtree(save / retention.name_of(iteration))
    again = pretrain(2, [*argv, "--save-total-limit", "1"], tmp_path / "again")
    assert again.codes == [0, 0] and sorted(again.steps) == list(range(latest + 1, 9))
    assert [again.steps[i]["lm_loss"] for i in again.steps] == [full.steps[i]["lm_loss"] for i in again.steps]


# -- another batch ---------------------------------------------------------------------------------------


def test_another_batch_size_is_announced(kept: tuple[Outcome, Path], start: list[str], tmp_path: Path) -> None:
    argv = [*LAYOUT, *start, "--load", str(kept[1]), "--global-batch-size", "8", "--train-iters", "8"]
    refused = pretrain(2, argv, tmp_path / "refused")
    assert refused.codes[0] == 1 and not refused.steps
    assert "error: the learning-rate schedule was 24 samples long (6 steps x 4), now it would be 64 (8 x 8)" \
        in refused.logs[0]
    found = pretrain(2, [*argv, "--override-opt-param-scheduler", "--seq-length", "16"], tmp_path / "found")
    assert found.codes == [0, 0], found.logs[0][-3000:]
    assert "the global batch size was 4, now it is 8: the data go on after sample 24" in found.logs[0]
    assert "the sequence length was 32, now it is 16" in found.logs[0]
    assert found.read[0] == list(range(24, 40)), "the position is kept in samples"


def test_a_data_set_written_again_under_its_name_is_said(kept: tuple[Outcome, Path], start: list[str],
                                                         tmp_path: Path) -> None:
    prefix = Path(start[start.index("--data-path") + 1])
    files = [prefix.with_name(prefix.name + ending) for ending in (".bin", ".idx")]
    before = [file.read_bytes() for file in files]
    other = datasets.write_dataset(tmp_path / "other", vocab_size=96, seed=1)
    argv = [*LAYOUT, *start, "--load", str(kept[1]), "--train-iters", str(STEPS)]
    try:
        for file in files:
            file.write_bytes(Path(other + file.suffix).read_bytes())
        found = pretrain(2, argv, tmp_path / "found")
    finally:
        for file, contents in zip(files, before, strict=True):
            file.write_bytes(contents)
    assert found.codes == [0, 0], found.logs[0][-3000:]
    assert re.search(rf"resume: the data set {prefix} was written again with other contents \(it was \d+ tokens, .*: "
                     "other samples, of which 24 are skipped", found.logs[0])


def test_killed_before_the_first_tracker_the_run_goes_on(start: list[str], tmp_path: Path) -> None:
    """The checkpoint has its name and nothing names it; neither weights nor steps are lost, and nothing is asked."""
    save = tmp_path / "save"
    argv = [*start, *saving(save), "--train-iters", "4"]
    assert pretrain(1, [*argv, "--exit-interval", "2"], tmp_path / "first").codes == [0]
    draft = _made(save / ".saving-k1ll")
    (save / retention.TRACKER).rename(draft / retention.TRACKER)
    second = pretrain(1, argv, tmp_path / "second")
    assert second.codes == [0] and sorted(second.steps) == [3, 4], second.logs[0][-3000:]
    assert "iter_0000002 is whole, and latest_checkpointed_iteration.txt did not say so yet" in second.logs[0]
    assert names(save) == ["iter_0000002", "iter_0000004", retention.TRACKER, "mixtral_config.json"]
    (save / retention.TRACKER).unlink()
    refused = pretrain(1, argv, tmp_path / "refused")
    assert refused.codes == [1] and not refused.steps
    assert "error: " in refused.logs[0] and "there are 2 and 4: write into this file" in refused.logs[0]


def test_what_cannot_be_kept_or_exported_is_refused(start: list[str], tmp_path: Path) -> None:
    for flags, sentence in [(["--save-total-limit", "0"], "--save-total-limit 0 would remove every checkpoint"),
                            (["--export-hf-interval", "3"], "--export-hf-interval 3 is not a multiple of --save-inter"),
                            ]:
        found = pretrain(1, [*start, *saving(tmp_path / "save"), "--train-iters", "1", *flags], tmp_path)
        assert found.codes == [1] and f"error: {sentence}" in found.logs[0]
    assert not (tmp_path / "save").exists()


def test_an_orphan_of_a_killed_run_is_tidied_away(start: list[str], tmp_path: Path) -> None:
    """What a kill during a save leaves is hidden, of no use, and removed by the next start."""
    save = tmp_path / "save"
    retention.draft(_made(save), 2)
    os.mkdir(save / ".removed-iter_0000001")
    outcome = pretrain(1, [*start, *saving(save), "--train-iters", "2"], tmp_path)
    assert outcome.codes == [0]
    assert names(save) == ["iter_0000002", retention.TRACKER, "mixtral_config.json"]


def _made(path: Path) -> Path:
    path.mkdir()
    return path
