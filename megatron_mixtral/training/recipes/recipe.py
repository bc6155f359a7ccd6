"""A recipe becomes a command line: its keys are flags of training or of preprocessing, each in one of five sections.

The section is for the reader. A key that is no flag, a section that is none, and a value of the wrong kind are
refused, with the neighbour that may be meant.
"""

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mixtral.command_line import Parser
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.training.flags import every_flag
from megatron_mixtral.training.recipes import book, raw_data

# Flags of XTuner, and what they are here: the rows of docs/from_xtuner.md.
_XTUNER = {
    "--deepspeed": "zero1 and zero2 are --use-distributed-optimizer, which every recipe has; in zero3's place weights "
                   "are cut by --expert-model-parallel-size and --pipeline-model-parallel-size",
    "--work-dir": "it is --save",
    "--launcher": "leave it out: the program sees who started it",
    "--resume": "the same command goes on from its last checkpoint; from an older one with --ckpt-step N",
}
# Flags that say the same in different ways: one that is typed takes all of them from the recipe, as it does itself.
_ALTERNATIVES = (
    {"--input", "--data-path", "--train-data-path", "--valid-data-path", "--test-data-path", "--data-args-path",
     "--per-split-data-args-path", "--mock-data"},
    {"--evaluation-questions", "--evaluation-prompts"},
    {"--train-epochs", "--train-iters", "--train-samples"},
    {"--lr-warmup-fraction", "--lr-warmup-iters", "--lr-warmup-samples"},
)  # fmt: skip


def read(recipe: str) -> book.Recipe:
    """The recipe of a file, or one of the book by its name. `ConfigError` for what cannot be read or is no recipe."""
    path = Path(recipe)
    if not path.is_file():
        return of_the_book(recipe)
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{recipe} cannot be read as TOML: {error}") from None
    for section, values in found.items():
        if section not in book.SECTIONS or not isinstance(values, Mapping):
            near = difflib.get_close_matches(section, book.SECTIONS, 1)
            raise ConfigError(f"{recipe}: there is no section [{section}]{f'; is it [{near[0]}]?' if near else ''} The "
                              f"sections are {', '.join(book.SECTIONS)}; a key stands in one of them")
    return found


def of_the_book(name: str) -> book.Recipe:
    """The recipe of a name. `ConfigError` where there is none."""
    if name in book.recipes():
        return book.recipes()[name]
    near = difflib.get_close_matches(name, book.recipes(), 1)
    raise ConfigError(f"{name} is neither a file nor the name of a recipe{f'; is it {near[0]}?' if near else ''} "
                      "(megatron-mixtral recipes list)")


def words_of(recipe: book.Recipe, where: str, typed: Sequence[str]) -> list[str]:
    """The command line of a recipe with the words that were `typed` behind its name, which win. `ConfigError` for a
    key that is no flag or is given twice, a value of the wrong kind, and typed words that are no flags.
    """
    parser = raw_data.add_flags(every_flag())
    given = {word.partition("=")[0] for word in typed if word.startswith("--")}
    out = given | {flag for group in _ALTERNATIVES if group & given for flag in group}
    words, place = [], {}
    for section, values in recipe.items():
        for key, value in values.items():
            flag = f"--{key}"
            if flag in place:
                raise ConfigError(f"{where}: {key} stands in [{place[flag]}] and in [{section}]; keep one of them")
            place[flag] = section
            written = list(_words(parser, flag, value, f"{where} [{section}] {key}"))
            words += [] if flag in out else written
    words += typed
    for word in parser.parse_known_args(words)[1]:
        if (flag := word.partition("=")[0]) in _XTUNER:
            raise ConfigError(f"{flag} is a flag of XTuner: {_XTUNER[flag]} (docs/from_xtuner.md)")
        raise ConfigError(f"{word} is neither a flag of training nor one of preprocessing, nor a value of the flag "
                          f"before it{parser.neighbours(word)}")
    return words


def _words(parser: Parser, flag: str, value: Any, where: str) -> Iterator[str]:
    if flag not in parser.flags():
        raise ConfigError(f"{where}: there is no such flag{parser.neighbours(flag)}")
    switch = parser.switch(flag)
    if isinstance(value, bool) != (switch is not None):
        raise ConfigError(f"{where} = {value!r}: expected {'a value' if switch is None else 'true or false'}")
    if switch is not None:
        yield from switch[value]
        return
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in values) or not values:
        raise ConfigError(f"{where} = {value!r}: expected a number, a text, or a list of them")
    yield flag
    yield from map(str, values)
