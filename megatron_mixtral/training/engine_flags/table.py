"""The engine's flags as data: how each is written (`parser.json`, which tests/unit/training/engine_flags writes and
compares with the engine) and what becomes of it in a run (`verdicts.toml`, written by hand).
"""

import argparse
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

PARSER = Path(__file__).with_name("parser.json")
VERDICTS = PARSER.with_name("verdicts.toml")
KINDS = ("works", "model", "needs", "unused", "refused")
TYPES = {"int": int, "float": float}  # other types are checked by the engine


@dataclass(frozen=True)
class EngineFlag:
    """One flag. `const` is what a switch stores; a flag with values has `keywords` of `add_argument` instead."""

    names: tuple[str, ...]
    group: str
    dest: str
    default: Any
    const: Any = None
    pair: bool = False  # --x and --no-x
    keywords: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.names[0]

    def add_to(self, parser: argparse._ArgumentGroup) -> None:
        """Add it under its name as dest, so that it is seen whether it was given, and in which of its forms."""
        common = {"dest": self.name, "default": argparse.SUPPRESS}
        if self.pair:
            parser.add_argument(self.name, action=argparse.BooleanOptionalAction, **common)
        elif self.const is not None:
            parser.add_argument(*self.names, action="store_const", const=self.const, **common)
        else:
            parser.add_argument(*self.names, **self.keywords, **common)

    def says_nothing(self, value: Any) -> bool:
        """Whether `value` is what the engine takes anyway."""
        return value == self.default or str(value) == str(self.default)


@dataclass(frozen=True)
class Verdict:
    """What becomes of a flag. `why` is the end of a sentence that begins with the flag.

    works: as Megatron does it. model: part of the architecture, which it may not contradict. needs: works with the
    `package`, or on a GPU ("cuda"). unused: leaving it out changes no number. refused: an error.
    """

    kind: str
    why: str = ""
    package: str = ""
    unless: str = ""  # another flag, with which it needs nothing
    values: Mapping[str, "Verdict"] = field(default_factory=dict)  # on single values, of kind refused or needs


@cache
def _written() -> dict[str, Any]:
    return json.loads(PARSER.read_text(encoding="utf-8"))


def engine() -> str:
    """Name and version of the engine whose flags these are."""
    return _written()["engine"]


@cache
def flags() -> Mapping[str, EngineFlag]:
    """Every flag by its name, in the order of the engine's groups."""
    found = {}
    for group, members in _written()["groups"].items():
        for names, spec in members.items():
            first, *others = names.split()
            spec = {"dest": first[2:].replace("-", "_"), **(spec if spec is not None else {"const": True})}
            dest, default, const, pair = (spec.pop(name, None) for name in ("dest", "default", "const", "pair"))
            if "type" in spec:
                spec["type"] = TYPES[spec["type"]]
            found[first] = EngineFlag((first, *others), group, dest, default, const, bool(pair), spec)
    return found


@cache
def _decided() -> dict[str, Any]:
    return tomllib.loads(VERDICTS.read_text(encoding="utf-8"))


def companions() -> list[tuple[str, str | None, list[str]]]:
    """(flag, its value or None for any, the flags of which it needs one)."""
    return [(name, entry.get("value"), entry["needs"].split()) for entry in _decided()["with"]
            for name in entry["flags"].split()]


@cache
def verdicts() -> Mapping[str, Verdict]:
    """The verdict on every flag, of the entry that means it most closely. `ValueError` for a flag that has none, or two
    equally close, and for one that the engine does not have.
    """
    table = _decided()
    found: dict[str, Verdict] = {}
    values: dict[str, dict[str, Verdict]] = {}
    for entry in table["values"]:
        one = Verdict("needs" if "package" in entry else "refused", entry.get("why", ""), entry.get("package", ""))
        values.setdefault(entry["flag"], {}).update(dict.fromkeys(entry["refused"].split(), one))
    claims: dict[str, list[tuple[int, Verdict]]] = {name: [] for name in flags()}
    for kind in KINDS:
        for entry in table[kind]:
            for name, closeness in _members(entry):
                said = {key: entry.get(key, "") for key in ("why", "package", "unless")}
                claims[name].append((closeness, Verdict(kind, **said, values=values.get(name, {}))))
    for name, verdicts_of in claims.items():
        closest = max((closeness for closeness, _ in verdicts_of), default=0)
        (found[name], *others) = [one for closeness, one in verdicts_of if closeness == closest] or [None]
        if found[name] is None or others:
            raise ValueError(f"{name} has {len(others) + 1 if found[name] else 'no'} verdict(s) in {VERDICTS.name}: "
                             "it has to have one")
    if strange := {*values, *(one for name, _, needs in companions() for one in (name, *needs))} - set(found):
        raise ValueError(f"values or companions of flags that the engine does not have: {' '.join(strange)}")
    return found


def _members(entry: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The flags of an entry, and how closely it means them: it names them (3), has a pattern (`--fp8-*`, 2), or the
    engine's group (1).
    """
    for group in entry.get("groups", ()):
        yield from ((flag.name, 1) for flag in flags().values() if flag.group == group)
    for word in entry.get("flags", "").split():
        matching = [name for name in flags() if fnmatchcase(name, word)]
        if not matching:
            raise ValueError(f"{word} is no flag of the engine's")
        yield from ((name, 2 if "*" in word else 3) for name in matching)
