"""Which flags name the data of a run: two of them name a file, and what is in it takes the file's place."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.training.data_files import expand, require
from megatron_mixtral.training.flags import parse


def write(folder: Path, text: str) -> str:
    (folder / "data.txt").write_text(text)
    return str(folder / "data.txt")


def test_words_of_a_file_are_those_of_data_path(tmp_path: Path) -> None:
    file = write(tmp_path, "0.6 A_document\n0.4 B_document\n")
    argv = expand(["--model", "tiny", "--data-args-path", file, "--lr", "1e-3"])
    assert argv == ["--model", "tiny", "--lr", "1e-3", "--data-path", "0.6", "A_document", "0.4", "B_document"]
    assert parse(argv)[1].data_path == ["0.6", "A_document", "0.4", "B_document"]


def test_splits_of_a_file_are_those_of_the_three_flags(tmp_path: Path) -> None:
    file = write(tmp_path, json.dumps({"train": "0.6 A 0.4 B", "valid": ["C"], "test": None}))
    argv = expand([f"--per-split-data-args-path={file}", "--bf16"])
    assert argv == ["--bf16", "--train-data-path", "0.6", "A", "0.4", "B", "--valid-data-path", "C"]


@pytest.mark.parametrize("text", ["A", "A\nB C", " 0.5 A\t0.5\nB\n"])
def test_the_engine_reads_the_same_words(text: str, tmp_path: Path) -> None:
    from megatron.core.datasets.utils import get_blend_from_list
    from megatron.training.utils import get_blend_and_blend_per_split

    none = dict.fromkeys(("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path",
                          "per_split_data_args_path"))
    file = write(tmp_path, text)
    found, _ = get_blend_and_blend_per_split(Namespace(**none | {"data_args_path": file}))
    assert found == get_blend_from_list(expand(["--data-args-path", file])[1:])
    file = write(tmp_path, json.dumps({"train": text, "valid": text.split(), "test": text}))
    _, splits = get_blend_and_blend_per_split(Namespace(**none | {"per_split_data_args_path": file}))
    given = parse(expand(["--per-split-data-args-path", file]))[1]
    assert splits == [get_blend_from_list(words) for words in
                      (given.train_data_path, given.valid_data_path, given.test_data_path)]


@pytest.mark.parametrize(("flag", "text", "sentence"), [
    ("--data-args-path", None, "cannot be read"), ("--data-args-path", " \n", "is empty"),
    ("--per-split-data-args-path", "train: A", "is not JSON"),
    ("--per-split-data-args-path", "[1]", "has list; expected"),
    ("--per-split-data-args-path", '{"train": "A"}', "has keys train; expected"),
    ("--per-split-data-args-path", '{"train": 3, "valid": "B", "test": "C"}', "train is 3, expected a string"),
    ("--per-split-data-args-path", '{"train": "", "valid": null, "test": []}', "names no data set"),
])
def test_files_of_another_form_are_refused(flag: str, text: str | None, sentence: str, tmp_path: Path) -> None:
    file = write(tmp_path, text) if text is not None else str(tmp_path / "none")
    with pytest.raises(DataError, match=f"{flag} {file}.*{sentence}"):
        expand([flag, file])


@pytest.mark.parametrize("argv", [
    "--data-path A --mock-data", "--data-path A --data-args-path B", "--data-args-path B --valid-data-path C",
    "--train-data-path A --per-split-data-args-path B", "--per-split-data-args-path B --mock-data",
])
def test_data_are_named_once(argv: str) -> None:
    with pytest.raises(ConfigError, match="the data of the run are given twice, by --.* and by --"):
        expand(argv.split())


def test_a_run_without_data_is_refused() -> None:
    assert expand(["--model", "tiny"]) == ["--model", "tiny"]
    for argv in ([], ["--data-path"]):
        with pytest.raises(ConfigError, match="no data are given: expected --data-path PREFIX .* or --mock-data"):
            require(argv)
    for argv in (["--mock-data"], ["--test-data-path", "A"]):
        require(argv)
