"""docs/flags.md: our flags, and the verdict on each of the engine's, by its groups. The test of the page writes it."""

import dataclasses
import typing
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from megatron_mixtral.training.engine_flags.refusals import PACKAGES
from megatron_mixtral.training.engine_flags.table import KINDS, EngineFlag, Verdict, companions, engine, flags, verdicts

HEAD = """# Flags

Every flag of the training program: ours, and the {count} of {engine}'s parser. A test writes this page from the table
by which the program decides, `megatron_mixtral/training/engine_flags/verdicts.toml`, and fails where it lacks one.

| verdict | how many | means |
|---|---|---|
| works | {works} | seen to work in a run of this program, or read by code of the engine's that it runs as it is |
| model | {model} | part of the architecture: may be repeated, and is refused where it contradicts the model |
| needs | {needs} | passed on to the engine with a package or on a GPU, refused without; no test here has either |
| unused | {unused} | accepted, and leaves every number as it is |
| refused | {refused} | an error in one sentence, in a dry run too, at any value but the engine's default |

`--help-engine` describes each flag in the engine's words.
"""


def page(ours: type) -> str:
    """The page; `ours` is the dataclass of our flags."""
    found = verdicts()
    counts = {kind: sum(one.kind == kind for one in found.values()) for kind in KINDS}
    parts = [HEAD.format(engine=engine(), count=len(found), **counts), "## Ours\n", *_ours(ours)]
    for group, members in groupby(flags().values(), lambda flag: flag.group):
        parts += [f"\n## {engine().split()[0]}: {group}\n", "| verdict | flags | |", "|---|---|---|", *_rows(members)]
    parts += ["\n## Values that are refused\n", "| flag | value | |", "|---|---|---|", *_values()]
    parts += ["\n## Flags that need another one\n", "Refused without it: they would fail later, or do nothing.\n",
              "| flag | needs |", "|---|---|", *_companions()]
    return "\n".join(parts) + "\n"


def _ours(ours: type) -> Iterator[str]:
    yield from ("| flag | value | does |", "|---|---|---|")
    for item in dataclasses.fields(ours):
        kind = next(one for one in typing.get_args(item.type) or (item.type,) if one is not type(None))
        value = " or ".join(item.metadata.get("choices", ())) or ("" if kind is bool else kind.__name__)
        yield f"| `--{item.name.replace('_', '-')}` | {value} | {item.metadata['help']} |"


def _rows(members: Iterable[EngineFlag]) -> Iterator[str]:
    """A row for each verdict and reason, in the order of `KINDS`."""
    found: dict[tuple[int, str, str], list[str]] = {}
    for flag in members:
        verdict = verdicts()[flag.name]
        found.setdefault((KINDS.index(verdict.kind), _why(verdict), verdict.kind), []).append(" ".join(flag.names))
    for (_, why, kind), names in sorted(found.items()):
        yield f"| {kind} | {' '.join(f'`{name}`' for name in sorted(names))} | {why} |"


def _why(verdict: Verdict) -> str:
    if verdict.kind != "needs":
        return verdict.why
    package = PACKAGES[verdict.package].partition(",")[0].partition(" (")[0]
    return f"{package}: {verdict.why}" if verdict.why else package


def _values() -> Iterator[str]:
    found: dict[tuple[str, str], list[Any]] = {}
    for name, verdict in verdicts().items():
        for value, one in verdict.values.items():
            found.setdefault((name, f"needs {_why(one)}" if one.kind == "needs" else one.why), []).append(value)
    for (name, why), values in found.items():
        yield f"| `{name}` | {' '.join(f'`{value}`' for value in values)} | {why} |"


def _companions() -> Iterator[str]:
    for name, value, needs in companions():
        yield f"| `{name}{f' {value}' if value else ''}` | {' or '.join(f'`{other}`' for other in needs)} |"
