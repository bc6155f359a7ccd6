"""The commands `recipes` and `finetune`. A recipe is a command line of the training program and of preprocessing; here
it becomes both.
"""

import os
import shlex
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_mixtral import disk
from megatron_mixtral.command_line import Parser
from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.data.instruction import InstructionOptions
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.runtime import launch
from megatron_mixtral.training import data_files, pretrain
from megatron_mixtral.training.checkpoints import lease
from megatron_mixtral.training.flags import parse
from megatron_mixtral.training.recipes import book, raw_data, recipe


def recipes(argv: Sequence[str]) -> int:
    """List the recipes that come along, or copy one to change it."""
    parser = Parser(description="Recipes of fine-tuning, to start from: megatron-mixtral finetune NAME, or a copy.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="list | copy", parser_class=Parser)
    listing = actions.add_parser("list", help="the names, and the devices that each takes at least")
    listing.add_argument("-p", "--pattern", default="", help="only names with this in them")
    copying = actions.add_parser("copy", help="write one as a file, with a word on every key")
    copying.add_argument("name", metavar="NAME")
    copying.add_argument("folder", type=Path, metavar="DIR")
    args = parser.parse_args(argv)
    if args.action == "list":
        names = [name for name in book.recipes() if args.pattern in name]
        if not names:
            raise ConfigError(f"no recipe has {args.pattern!r} in its name; megatron-mixtral recipes list shows all")
        for name in names:
            print(f"{name:48} {book.devices(book.recipes()[name]):3} device(s) or more")
        return 0
    recipe.of_the_book(args.name)
    target = args.folder / f"{args.name}.toml"
    if target.exists():
        raise ConfigError(f"{target} is there already, and may have been changed: remove it, or give another folder")
    args.folder.mkdir(parents=True, exist_ok=True)
    disk.write_whole(target, book.text(args.name))
    print(target)
    return 0


@dataclass(frozen=True)
class _Job:
    """What a recipe asks for: the words of the training program, and what is made for it first."""

    training: list[str]
    data: InstructionOptions | None  # to be preprocessed
    questions: raw_data.Questions | None  # of an evaluation

    def commands(self) -> list[str]:
        """What to type to have the same."""
        lines = [_typed(raw_data.command(self.data))] if self.data is not None else []
        if self.questions is not None:
            lines.append(f"# {self.questions.file}: the recipe's questions as prompts, which finetune writes")
        return [*lines, _typed(["pretrain", *self.training])]


def finetune(argv: Sequence[str]) -> int:
    """Train as a recipe says, or print what it would type (DRY_RUN=1 in the environment). Errors and status as of the
    training program.
    """
    parser = Parser(
        description="Fine-tune a Mixtral as a recipe says, from raw dialogues on.", usage="%(prog)s RECIPE [flag ...]",
        epilog="Flags behind RECIPE win over the recipe's. They are those of megatron-mixtral pretrain, and of "
               "preprocess: --input --handler-name --prompt-type --pack --append-eod --on-error --workers; and "
               "--evaluation-questions TEXT ..., answered as --evaluation-prompts are. DRY_RUN=1 in the environment "
               "prints the commands, --dry-run also says what the run would need.")  # fmt: skip
    parser.add_argument("recipe", metavar="RECIPE", help="a file, or a name of megatron-mixtral recipes list")
    name = parser.parse_args(argv[:1]).recipe
    job: list[_Job] = []
    status = launch.as_rank(partial(_prepare, name, list(argv[1:]), job))
    if status or launch.only_prints():
        return status
    return pretrain.run(job[0].training)


def _prepare(name: str, typed: list[str], out: list[_Job]) -> None:
    """The job, with its data made, into `out`; or only said, in a dry run."""
    raw, training = raw_data.split(recipe.words_of(recipe.read(name), name, typed))
    dry = launch.only_prints() or "--dry-run" in training
    job = _job(name, raw, training, dry)
    out.append(job)
    first = launch.is_first_here()
    if dry:
        for line in job.commands() if first else ():
            print(line, flush=True)
        return
    try:
        run = pretrain.check(job.training)  # before any data are made for it
    except ConfigError as error:
        if job.questions is not None and "--evaluation-" in str(error):
            error.add_note(f"{name} asks it: to ask nothing, take evaluation-questions and evaluation-interval out of "
                           "a copy of the recipe")
        raise
    if job.data is not None:
        raw_data.make(job.data, first, lease.this_process({**os.environ, **run.ranks.to_train()}))
    if job.questions is not None:
        job.questions.write()


def _job(name: str, raw: Namespace, training: list[str], planned: bool) -> _Job:
    """The job of a recipe's words. `ConfigError` for what is missing in them or given twice."""
    flags, given = parse(training)
    for what, value in (("hf-checkpoint = DIR", flags.hf_checkpoint), ("save = DIR", given.save),
                        ("seq-length = N", given.seq_length)):
        if value is None:
            raise ConfigError(f"{name} needs {what} in [settings], or as a flag behind its name")
    tokenizer = given.tokenizer_model or flags.tokenizer_name_or_path or flags.hf_checkpoint
    multiple = ParallelLayout(cp=given.context_parallel_size).chunks
    wanted, folder = raw_data.options(raw, tokenizer, given.seq_length, multiple), Path(given.save) / "data"
    words = training + ["--is-instruction-dataset"] * (not flags.is_instruction_dataset)
    if given.load is None:
        words += ["--load", given.save]
    if raw.input and data_files.are_given(training):
        raise ConfigError(f"{name} names raw data with input and a data set besides; keep one of them")
    if raw.input:
        wanted = raw_data.placed(wanted, folder, planned)
        words += ["--data-path", wanted.output_prefix]
    asked = None
    if raw.evaluation_questions:
        asked = raw_data.Questions(tuple(raw.evaluation_questions), wanted.template_name, tokenizer, folder)
        words += ["--evaluation-prompts", str(asked.file)]
        words += [] if given.tokenizer_model or flags.tokenizer_name_or_path else ["--tokenizer-model", tokenizer]
    return _Job(words, wanted if raw.input else None, asked)


def _typed(words: Sequence[str]) -> str:
    """A command as a shell reads it, a flag and its values on a line."""
    lines = ["megatron-mixtral"]
    for word in words:
        if word.startswith("--"):
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n".join(lines)
