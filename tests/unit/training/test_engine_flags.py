"""`engine_flags.json` lists the flags of the pinned engine; run this file as a program to write it again."""

import argparse
import importlib.metadata
import json
from typing import Any

from megatron_mixtral.training import flags

TYPES = {int: "int", float: "float"}  # others are checked by the engine


def spec(action: argparse.Action) -> dict[str, Any] | None:
    """The keywords of `add_argument` for a flag with values, None for a switch."""
    if action.nargs == 0:
        return None
    choices = None if action.type not in (None, str, int) else action.choices
    found = {"type": TYPES.get(action.type), "nargs": action.nargs, "choices": choices and list(choices)}
    return {name: value for name, value in found.items() if value is not None}


def table() -> dict[str, Any]:
    """The engine's own parser, written down."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False, add_help=False))
    assert all(action.option_strings for action in parser._actions), "the engine has positional arguments now"
    return {"engine": f"megatron-core {importlib.metadata.version('megatron-core')}",
            "flags": {" ".join(action.option_strings): spec(action) for action in parser._actions}}


def written() -> dict[str, Any]:
    return json.loads(flags.ENGINE_FLAGS.read_text(encoding="utf-8"))


def test_the_table_is_the_engine_s_parser() -> None:
    assert written() == table(), f"write the table again: python {__file__}"


if __name__ == "__main__":
    found = table()
    lines = [f"  {json.dumps(names)}: {json.dumps(values)}" for names, values in sorted(found["flags"].items())]
    text = ",\n".join(lines)
    flags.ENGINE_FLAGS.write_text(f'{{"engine": {json.dumps(found["engine"])}, "flags": {{\n{text}\n}}}}\n')
