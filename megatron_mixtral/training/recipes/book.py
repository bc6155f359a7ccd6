"""The recipes that come along, made of the parts in `book.toml`: by name, and as the text of a whole file."""

import json
import tomllib
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

SECTIONS = ("settings", "model", "data", "optimizer", "runtime")
Recipe = dict[str, dict[str, Any]]  # section -> key -> value, as in the file

_BOOK = Path(__file__).with_name("book.toml")
_WIDE = 60  # from here on, what a key is stands above it
_HEAD = """\
# {name}, for {devices}: a key is a flag of
# `megatron-mixtral pretrain` or of `megatron-mixtral preprocess`, in whichever section. To start it:
#
#     megatron-mixtral finetune {file}
#
# Flags behind the file's name win. Several nodes: torchrun or srun, as for pretrain (docs/finetuning.md)."""


@cache
def recipes() -> dict[str, Recipe]:
    """Every recipe by its name."""
    book = tomllib.loads(_BOOK.read_text(encoding="utf-8"))
    found = {}
    for model, method, data in product(book["models"], book["methods"], book["data"]):
        its_model = book["models"][model]
        parts = [book["base"], book["data"][data], book["methods"][method], its_model, its_model.get(method, {})]
        name = f"{model}_{method}_{data}_e{_over(*parts)['settings']['train-epochs']}"
        found[name] = _over(*parts, {"settings": {"save": f"./ckpt/{name}"}})
    return found


def _over(*parts: dict[str, Any]) -> Recipe:
    """The sections of the parts, a later one's keys over those before; what is empty in the end goes."""
    found: Recipe = {}
    for section in SECTIONS:
        merged = {key: value for part in parts for key, value in part.get(section, {}).items()}
        found[section] = {key: value for key, value in merged.items() if value != ""}
    return found


def devices(recipe: Recipe) -> int:
    """The smallest number of devices that its layout takes."""
    sizes = [recipe["runtime"].get(f"{axis}-model-parallel-size", 1) for axis in ("pipeline", "expert")]
    return sizes[0] * sizes[1]


def text(name: str) -> str:
    """The file of a recipe: `recipes()[name]`, with what each key is beside it."""
    recipe, said = recipes()[name], tomllib.loads(_BOOK.read_text(encoding="utf-8"))["says"]
    count = devices(recipe)
    head = _HEAD.format(name=name, file=f"{name}.toml", devices=f"{count} device{'s' if count > 1 else ''} or more")
    return "\n".join([head, *_lines(recipe, said)]) + "\n"


def _lines(recipe: Recipe, said: dict[str, str]) -> Iterator[str]:
    for section, values in recipe.items():
        yield from ("", f"[{section}]")
        words = {key: f"{key} = {_literal(value)}" for key, value in values.items()}
        width = max((len(one) for one in words.values() if len(one) < _WIDE), default=0)
        for key, one in words.items():
            if key not in said:
                yield one
            elif len(one) < _WIDE:
                yield f"{one:<{width}}  # {said[key]}"
            else:
                yield from (f"# {said[key]}", one)


def _literal(value: Any) -> str:
    """A value as TOML: numbers, booleans, texts and lists of texts are written as in JSON."""
    return json.dumps(value, ensure_ascii=False)
