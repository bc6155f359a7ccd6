"""Which flags name a run's data: exactly one of them, and the two that name a file are replaced by what is in it.

The pinned engine's program reads both files; its parser also takes a run without any data, and trains it on made-up
tokens. `training/pretrain.py` calls `expand` before anything else is read, so that data of a file are checked, split,
saved in a checkpoint and compared on resuming like those of `--data-path`.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import ConfigError, DataError

SPLITS = {"train": "--train-data-path", "valid": "--valid-data-path", "test": "--test-data-path"}
_WORDS, _SPLIT_FILE = "--data-args-path", "--per-split-data-args-path"
_SOURCES = ("--data-path", _WORDS, "--train-data-path, --valid-data-path, --test-data-path", _SPLIT_FILE, "--mock-data")


def expand(argv: Sequence[str]) -> list[str]:
    """The command line with the data that a file names in place of the file's flag.

    `--data-args-path FILE` has the words of `--data-path`, over as many lines as one likes; `--per-split-data-args-path
    FILE` is a JSON object of "train", "valid" and "test", each the words of a blend in a string or a list, or null.
    `ConfigError` where data are named in two ways, `DataError` for a file that cannot be read or has another form.
    """
    given, rest = _given(argv)
    if len(given) > 1:
        raise ConfigError(f"the data of the run are given twice, by {' and by '.join(given)}: keep one of them")
    if _WORDS in given:
        words = _read(_WORDS, given[_WORDS]).split()
        if not words:
            raise DataError(f"{_WORDS} {given[_WORDS]}: the file is empty; expected the words of --data-path")
        return [*rest, "--data-path", *words]
    if _SPLIT_FILE in given:
        return [*rest, *_per_split(given[_SPLIT_FILE])]
    return list(argv)


def require(argv: Sequence[str]) -> None:
    """`ConfigError` where nothing says what to train on."""
    if not are_given(argv):
        raise ConfigError("no data are given: expected --data-path PREFIX (or --train-data-path ..., --data-args-path "
                          "FILE, --per-split-data-args-path FILE), or --mock-data for made-up tokens, to try a machine")


def are_given(argv: Sequence[str]) -> bool:
    """Whether a flag says what to train on."""
    return bool(_given(argv)[0])


def _given(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What names data, by the name of the way, and all other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--data-path", *SPLITS.values()):
        parser.add_argument(flag, nargs="*")
    for flag in (_WORDS, _SPLIT_FILE):
        parser.add_argument(flag)
    parser.add_argument("--mock-data", action="store_true")
    found, rest = parser.parse_known_args(argv)
    per_split = [found.train_data_path, found.valid_data_path, found.test_data_path]
    values = (found.data_path, found.data_args_path, per_split if any(per_split) else None,
              found.per_split_data_args_path, found.mock_data)
    return {name: value for name, value in zip(_SOURCES, values, strict=True) if value}, rest


def _read(flag: str, file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{flag} {file}: cannot be read ({error}); expected a text file that names data sets") from None


def _per_split(file: str) -> list[str]:
    where = f"{_SPLIT_FILE} {file}"
    expected = 'expected {"train": "A_text_document", "valid": "B_text_document", "test": null}'
    try:
        table = json.loads(_read(_SPLIT_FILE, file))
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: is not JSON ({error}); {expected}") from None
    if not isinstance(table, Mapping) or set(table) != set(SPLITS):
        found = f"keys {', '.join(table) or '(none)'}" if isinstance(table, Mapping) else type(table).__name__
        raise DataError(f"{where}: has {found}; {expected}")
    argv: list[str] = []
    for split, words in table.items():
        if not isinstance(words, str | list | None):
            raise DataError(f"{where}: {split} is {words!r}, expected a string, a list or null")
        words = words.split() if isinstance(words, str) else [str(word) for word in words or ()]
        argv += [SPLITS[split], *words] if words else []
    if not argv:
        raise DataError(f"{where}: names no data set; {expected}")
    return argv
