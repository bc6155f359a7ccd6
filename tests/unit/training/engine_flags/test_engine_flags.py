"""The flags of the pinned engine: written down, each with a verdict, each refusal real. Run this file as a program to
write `parser.json` and docs/flags.md again.
"""

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from megatron_mixtral.config import engine
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.training import engine_flags
from megatron_mixtral.training.arguments import resolve
from megatron_mixtral.training.engine_flags import table as tables
from megatron_mixtral.training.flags import Flags, parse

ROOT = Path(__file__).resolve().parents[4]
PAGE = ROOT / "docs" / "flags.md"
TYPES = {int: "int", float: "float"}  # others are checked by the engine


def spec(action: argparse.Action) -> dict[str, Any] | None:
    """How a flag is written; None for a switch that stores True under its own name. What is None is left out."""
    dest = action.dest if action.dest != action.option_strings[0][2:].replace("-", "_") else None
    default = action.default.name if isinstance(action.default, Enum) else action.default
    found: dict[str, Any] = {"dest": dest, "default": default}
    if isinstance(action, argparse.BooleanOptionalAction):
        found["pair"] = True
    elif action.nargs == 0:
        if action.const is True and dest is None:
            return None
        found |= {"const": action.const, "default": default or None}
    else:
        choices = None if action.type not in (None, str, int) else action.choices
        found |= {"type": TYPES.get(action.type), "nargs": action.nargs, "choices": choices and list(choices)}
    return {name: value for name, value in found.items() if value is not None}


def table() -> dict[str, Any]:
    """The engine's own parser, written down."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False, add_help=False))
    groups = {group.title: {" ".join(action.option_strings): spec(action) for action in group._group_actions}
              for group in parser._action_groups if group._group_actions}
    assert "" not in groups, "the engine has positional arguments now"
    return {"engine": f"megatron-core {importlib.metadata.version('megatron-core')}", "groups": groups}


def test_the_table_is_the_engine_s_parser() -> None:
    assert json.loads(engine_flags.PARSER.read_text()) == table(), f"write the table again: python {__file__}"


def given(flag: engine_flags.EngineFlag) -> dict[str, Any]:
    """The flag as parsed, with a value that is not the engine's default."""
    if flag.pair or flag.const is not None:
        return {flag.name: True if flag.pair else flag.const}
    choices = [one for one in flag.keywords.get("choices", ()) if not flag.says_nothing(one)]
    kind = flag.keywords.get("type", str)
    value = choices[0] if choices else kind(flag.default or 0) + 1 if kind is not str else "something"
    return {flag.name: [value] if "nargs" in flag.keywords else value}


def test_every_flag_has_one_verdict() -> None:
    found = engine_flags.verdicts()
    assert set(found) == set(engine_flags.flags()) and len(found) > 800
    for name, verdict in found.items():
        assert verdict.why or verdict.kind not in ("refused", "unused"), name
        for value, one in verdict.values.items():
            choices = engine_flags.flags()[name].keywords.get("choices")
            assert (one.why or one.package) and (choices is None or value in choices), f"{name} {value}"


def test_a_flag_without_a_verdict_or_with_two_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tables.VERDICTS.read_text()
    monkeypatch.setattr(tables, "VERDICTS", tmp_path / "verdicts.toml")
    for changed, problem in [(text.replace("--clip-grad ", ""), "--clip-grad has no verdict"),
                             (text.replace("--clip-grad ", "--clip-grad --use-sharp "), "--use-sharp has 2 verdict"),
                             (text.replace("--clip-grad ", "--clip-grads "), "--clip-grads is no flag")]:
        tables.VERDICTS.write_text(changed)
        tables._decided.cache_clear()
        tables.verdicts.cache_clear()
        with pytest.raises(ValueError, match=re.escape(problem)):
            tables.verdicts()
    monkeypatch.undo()
    tables._decided.cache_clear()
    tables.verdicts.cache_clear()


def test_every_refused_flag_is_refused_with_a_sentence() -> None:
    for name, flag in engine_flags.flags().items():
        if engine_flags.verdicts()[name].kind == "refused":
            with pytest.raises(ConfigError, match=re.escape(name)) as error:
                engine_flags.check(given(flag))
            assert ": " in str(error.value) and "\n" not in str(error.value), error.value


def test_every_refused_value_is_refused() -> None:
    for name, verdict in engine_flags.verdicts().items():
        for value, one in verdict.values.items():
            with pytest.raises(ConfigError, match=re.escape(f"{name} {value} ")):
                if one.package == "cuda":
                    engine_flags.check_device({name: value}, "cpu")
                engine_flags.check({name: value})


@pytest.mark.parametrize(("package", "said"), [("transformer_engine", "transformer-engine"), ("wandb", "wandb")])
def test_what_needs_a_package_is_refused_without_it(package: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = set()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True if name in there else None)
    needing = [flag for flag in engine_flags.flags().values()
               if engine_flags.verdicts()[flag.name].package == package]
    assert len(needing) > 3
    for flag in needing:
        with pytest.raises(ConfigError, match=f"{flag.name}.* needs {said}"):
            engine_flags.check(given(flag))
    there.add(package)
    for flag in needing:
        engine_flags.check(given(flag))


def test_what_needs_a_gpu_is_refused_on_a_cpu() -> None:
    for flag in engine_flags.flags().values():
        if engine_flags.verdicts()[flag.name].package in ("cuda", "transformer_engine"):
            engine_flags.check_device(given(flag), "cuda")
            with pytest.raises(ConfigError, match=f"{flag.name}.* needs a GPU"):
                engine_flags.check_device(given(flag), "cpu")
    engine_flags.check_device({"--profile": True, "--use-pytorch-profiler": True}, "cpu")


def test_what_the_engine_takes_anyway_may_be_said() -> None:
    words = []
    for flag in engine_flags.flags().values():
        if flag.default not in (None, [], "") and flag.const is None and not flag.pair \
                and str(flag.default) not in engine_flags.verdicts()[flag.name].values:
            words += [flag.name, *map(str, flag.default if isinstance(flag.default, list) else [flag.default])]
    assert len(words) > 300
    parse(words)


@pytest.mark.parametrize("name", sorted(set(engine.FOREIGN)))
def test_switches_of_other_models_are_refused(name: str) -> None:
    """What export and inspection call another model is so in a run."""
    assert {engine_flags.verdicts()[flag.name].kind for flag in engine_flags.flags().values() if flag.dest == name} \
        == {"refused"}


def test_a_flag_of_the_architecture_may_agree_and_not_contradict() -> None:
    resolve("--model tiny --num-layers 4 --swiglu --normalization RMSNorm --disable-bias-linear --moe-layer-freq 1 "
            "--untie-embeddings-and-output-weights --rotary-base 1000000 --attention-dropout 0.0".split(), {})
    for words in ("--num-layers 5", "--squared-relu", "--window-size 16,0", "--moe-layer-freq 2",
                  "--hidden-dropout 0.1", "--position-embedding-type yarn"):
        with pytest.raises(ConfigError, match=f"{words.split()[0]} .*contradicts the model's"):
            resolve(["--model", "tiny", *words.split()], {})


@pytest.mark.parametrize(("words", "sentence"), [
    ("--save runs", "--save runs needs --save-interval"),
    ("--save-interval 5", "--save-interval 5 needs --save: give"),
    ("--recompute-method uniform", "needs --recompute-granularity"),
    ("--recompute-granularity full", "needs --recompute-method"),
    ("--lr-decay-style WSD", "needs --lr-wsd-decay-iters or --lr-wsd-decay-samples"),
    ("--no-initialization", "give --load, --pretrained-checkpoint or --hf-checkpoint"),
    ("--optimizer muon", "--optimizer muon needs the package emerging-optimizers"),
    ("--moe-token-dispatcher-type flex", "use alltoall or allgather"),
    ("--context-parallel-size 2 --cp-comm-type a2a", "--cp-comm-type a2a needs transformer-engine, which is not inst"),
    ("--log-straggler", "metrics.jsonl names the slowest rank"), ("--inprocess-restart", "let torchrun restart them"),
    ("--non-persistent-ckpt-type local", "use --save-interval"), ("--delay-wgrad-compute", "needs transformer-engine"),
    ("--moe-enable-deepep", "use --moe-token-dispatcher-type alltoall"), ("--fp8-format hybrid", "transformer-engine"),
    ("--reset-position-ids", "which rotary embeddings"), ("--checkpoint-activations", "no longer read"),
])
def test_sentences(words: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        resolve(["--model", "tiny", *words.split()], {"WORLD_SIZE": "2"})


def test_a_dry_run_refuses_too() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "pretrain_mixtral.py"), "--model", "tiny", "--dry-run",
                           "--tp-comm-overlap"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "--tp-comm-overlap needs transformer-engine, which is not installed: install the extra [te]" in done.stderr


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == engine_flags.page(Flags), f"write it again: python {__file__}"


def write() -> None:
    found = table()
    groups = []
    for title, flags in found["groups"].items():
        lines = ",\n".join(f"  {json.dumps(names)}: {json.dumps(values)}" for names, values in sorted(flags.items()))
        groups.append(f"{json.dumps(title)}: {{\n{lines}\n}}")
    text = ",\n".join(groups)
    engine_flags.PARSER.write_text(f'{{"engine": {json.dumps(found["engine"])}, "groups": {{\n{text}\n}}}}\n')
    PAGE.write_text(engine_flags.page(Flags), encoding="utf-8")


if __name__ == "__main__":
    write()
