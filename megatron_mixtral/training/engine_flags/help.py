"""What `--help` prints, at once: our flags by task, beside each task the flags of the engine that it usually takes, and
where all of those are. `--help-engine` asks the engine's own parser, in its words, which takes its import.
"""

import argparse
import dataclasses
import textwrap
import typing
from collections.abc import Callable, Iterator

from megatron_mixtral.training.engine_flags.table import engine

TASKS = {  # task of ours: the engine's flags for it
    "model and start": "--load DIR --finetune --pretrained-checkpoint DIR --bf16",
    "data": "--data-path PREFIX ... --split 98,1,1 --seq-length N",
    "devices and layout": "--tensor-model-parallel-size N --pipeline-model-parallel-size N "
                          "--expert-model-parallel-size N --use-distributed-optimizer",
    "experts": "--moe-aux-loss-coeff X --moe-z-loss-coeff X",
    "adapters": "--moe-aux-loss-coeff X --lr X",
    "steps": "--micro-batch-size N --global-batch-size N --train-iters N --lr X --eval-interval N --eval-iters N",
    "checkpoints": "--save DIR --save-interval N --async-save --ckpt-step N",
    "what it says": "--tensorboard-dir DIR --wandb-project NAME --log-interval N",
}  # fmt: skip
EXAMPLE = """\
example, on one machine, with text that `megatron-mixtral preprocess` has tokenized into my_text_document.bin and .idx:
  {program} --model tiny --data-path my_text_document --seq-length 256 --micro-batch-size 1 \\
      --global-batch-size 8 --train-iters 100 --lr 3e-4 --save ckpt --save-interval 50 --load ckpt
Add --dry-run to see what it would need, and start nothing.
"""


def page(ours: type, program: str) -> str:
    """The page of `--help`, at most 100 columns wide; `ours` is the dataclass of our flags."""
    parts = [f"usage: {program} [flag ...]\n", "Every flag is ours, below, or one of the training program of "
             f"{engine()}:\n  --help-engine   describes those (it imports the engine, which takes some seconds)\n"
             "  docs/flags.md   says which of them work here\n", EXAMPLE.format(program=program)]
    for task, usual in TASKS.items():
        parts.append(f"{task}:")
        for item in dataclasses.fields(ours):
            if item.metadata["task"] == task:
                parts += _described(item)
        parts += [textwrap.fill(usual, 100, initial_indent="  of the engine: ", subsequent_indent=" " * 17,
                                break_on_hyphens=False), ""]
    return "\n".join(parts)


def _described(item: dataclasses.Field) -> Iterator[str]:
    """A flag of ours and what it does."""
    kind = next(one for one in typing.get_args(item.type) or (item.type,) if one is not type(None))
    value = "|".join(item.metadata.get("choices", ())) or ("" if kind is bool else item.metadata.get("value", "N"))
    text = item.metadata["help"]
    if item.default not in (None, False) and "default" not in text:
        text += f" (default: {item.default})"
    yield f"  --{item.name.replace('_', '-')} {value}".rstrip()
    yield textwrap.fill(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)


class _Words(argparse.HelpFormatter):
    """The engine's help as it is written: a stray % in it is a %, not the beginning of a form."""

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            return action.help


def of_the_engine(add_arguments: Callable[[argparse.ArgumentParser], object]) -> str:
    """The help of the engine's parser, by its groups. `add_arguments` fills one."""
    parser = argparse.ArgumentParser(prog=engine().split()[0], usage=argparse.SUPPRESS, add_help=False,
                                     formatter_class=_Words)
    add_arguments(parser)
    return parser.format_help()
