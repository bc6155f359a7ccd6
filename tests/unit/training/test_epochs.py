"""`--train-epochs`: how many steps it is, what is said of it, and where it makes no sense."""

from pathlib import Path

import pytest
from helpers.datasets import numbered_rows, write_dataset

from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.training import arguments, preflight, pretrain

COMMON = ["--model", "tiny", "--seq-length", "8", "--micro-batch-size", "1", "--is-instruction-dataset"]


def steps(*flags: str) -> tuple[int, str]:
    run = arguments.resolve([*COMMON, *flags], {"WORLD_SIZE": "2"})
    return preflight.steps_of_epochs(run, preflight.shape_of(run))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("sets")
    return [numbered_rows(folder / "a", 3, 50), numbered_rows(folder / "b", 53, 7)]


def test_every_row_is_read_so_many_times(sets: list[str]) -> None:
    a, b = sets
    for flags, expected in (
            (["--data-path", a, "--split", "100,0,0", "--global-batch-size", "4", "--train-epochs", "1"], 13),
            (["--data-path", a, "--split", "100,0,0", "--global-batch-size", "4", "--train-epochs", "2"], 25),
            (["--data-path", a, "--split", "90,10,0", "--global-batch-size", "4", "--train-epochs", "4"], 45),
            (["--data-path", a, "--global-batch-size", "48", "--train-epochs", "3"], 3),  # the engine's 969,30,1
            (["--data-path", a, b, "--split", "1,0,0", "--global-batch-size", "2", "--train-epochs", "3"], 86),
            (["--train-data-path", a, "--global-batch-size", "10", "--train-epochs", "3"], 15),
            (["--data-path", a, "--split", "1,0,0", "--train-epochs", "1"], 25)):  # two replicas of one row
        assert steps(*flags)[0] == expected, flags
    _, said = steps("--data-path", a, "--split", "1,0,0", "--global-batch-size", "10", "--train-epochs", "4",
                    "--lr-warmup-fraction", "0.1")
    assert said == "4 epoch(s) of 50 rows / --global-batch-size 10 = 20 step(s), the first 2 of them warm-up"


@pytest.mark.parametrize(("flags", "words"), [
    (["--train-epochs", "0"], "--train-epochs 0 trains nothing"),
    (["--train-epochs", "2", "--train-iters", "3"], "--train-epochs 2 and --train-iters 3 both say how long to train"),
    (["--train-epochs", "2", "--train-samples", "3"], "and --train-samples 3 both say"),
])
def test_what_makes_no_sense_is_refused(flags: list[str], words: str, sets: list[str]) -> None:
    with pytest.raises(ConfigError, match=words):
        steps("--data-path", sets[0], *flags)


def test_plain_text_and_weights_have_no_epoch(sets: list[str], tmp_path: Path) -> None:
    text = write_dataset(tmp_path / "text", vocab_size=96, documents=3)
    flags = [*COMMON[:-1], "--data-path", text, "--train-epochs", "2"]
    with pytest.raises(ConfigError, match=r"plain text has none.*give --train-iters"):
        arguments.resolve(flags, {})
    with pytest.raises(ConfigError, match="each set ends its epoch at another step"):
        steps("--data-path", "0.5", sets[0], "0.5", sets[1], "--train-epochs", "2")
    with pytest.raises(ConfigError, match="has no row"):
        steps("--data-path", sets[1], "--split", "1,99,0", "--train-epochs", "2")
    with pytest.raises(ConfigError, match="--split 0,0,0: expected the sizes of three parts"):
        steps("--data-path", sets[1], "--split", "0,0,0", "--train-epochs", "2")
    with pytest.raises(DataError, match="does not exist"):
        steps("--data-path", str(tmp_path / "nowhere"), "--train-epochs", "2")


def test_a_dry_run_says_the_steps(sets: list[str], caplog: pytest.LogCaptureFixture) -> None:
    for prefix, words in ((sets[1], "steps: 2 epoch(s) of 7 rows / --global-batch-size 1 = 14 step(s)"),
                          ("nowhere", "steps: 2 epoch(s), counted once the data are there: ")):
        caplog.clear()
        with caplog.at_level("INFO"):
            assert pretrain.run([*COMMON, "--data-path", prefix, "--split", "1,0,0", "--train-epochs", "2",
                                 "--dry-run"]) == 0
        assert caplog.messages[-1].startswith(words)
