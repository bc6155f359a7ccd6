"""The commands: `megatron-mixtral NAME ...`, `python -m megatron_mixtral NAME ...`, and the programs in `tools/`.

Each command is a function `(argv) -> int` that its room offers and that raises `MixtralError` for what a user can
cause. Here is the only place where such an error becomes a sentence and an exit status. No room is imported before
the command is known, so the list of commands needs neither torch nor numpy.
"""

import importlib
import logging
import operator
import os
import sys
from collections.abc import Sequence

from megatron_mixtral import __version__
from megatron_mixtral.errors import MixtralError

PROGRAM = "megatron-mixtral"
COMMANDS = {  # name: (room, what it offers, one line)
    "preprocess": ("data", "preprocess_command", "tokenize text or dialogues into .bin/.idx datasets"),
    "merge": ("data", "merge_command", "join .bin/.idx datasets into one"),
    "inspect-dataset": ("data", "inspect_dataset_command", "show and check a .bin/.idx dataset"),
    "convert": ("weights", "cli.convert", "Hugging Face to Megatron, Megatron to another layout, and back"),
    "convert-to-hf": ("weights", "cli.megatron_to_hf", "a Megatron checkpoint to a Hugging Face folder"),
    "inspect": ("weights", "cli.inspect", "say what a model or checkpoint folder is, and if it is whole"),
    "select-experts": ("weights", "cli.select_experts", "keep some experts of every layer: 8x7B to 4x7B"),
    "upcycle": ("weights", "cli.upcycle", "make a Mixtral of a dense Mistral or Llama"),
    "merge-lora": ("lora", "cli.merge_lora", "adapters into the model that they were trained on, in any form"),
    "plan": ("planning", "plan_command", "rank the parallel layouts that fit a machine, by predicted step time"),
    "pretrain": ("training", "pretrain_command", "train, with tensor, pipeline, expert and data parallelism"),
    "recipes": ("training", "recipes_command", "list the recipes of fine-tuning, and copy one"),
    "finetune": ("training", "finetune_command", "train as a recipe says, from raw dialogues on"),
    "generate": ("inference", "cli.generate", "continue prompts with a trained model, in any layout"),
    "chat": ("inference", "chat.chat", "talk to a model in the terminal, in any layout"),
    "serve": ("server", "serve_command", "serve a model: OpenAI's API and a chat page, in any layout"),
    "evaluate": ("evaluation", "cli.evaluate", "measure a trained model: MMLU and lm-eval's tasks, in any layout"),
    "perplexity": ("evaluation", "cli.perplexity", "loss and perplexity of texts and data sets, in any layout"),
    "plot-evaluation": ("evaluation", "cli.plot", "draw accuracies by subject, beside a reference's"),
    "build-index-cache": ("training", "build_index_cache_command", "build the index cache of a run ahead of it"),
    "plot": ("training", "plot_command", "draw loss, throughput and load of the experts of runs"),
    "watch": ("training", "watch_command", "show runs while they go on, in the terminal or on a page"),
    "calc": ("training", "calc_command", "average the throughput of a run"),
}  # fmt: skip
# Set before anything is imported, unless the user has set them. OpenBLAS reads its variable when numpy is imported, and
# starts its threads then. Preprocessing has no use for them, and a process with threads cannot fork its workers.
VARIABLES = {"preprocess": {"OPENBLAS_NUM_THREADS": "1"}, "finetune": {"OPENBLAS_NUM_THREADS": "1"}}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own. The exit status is that of `run`, or 2 for no such command."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(PROGRAM, __version__)
        return 0
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv[0] = f"{PROGRAM} {name}"  # which argparse shows as the program's name
    return run(name, rest)


def usage() -> str:
    """The list of commands, a line each."""
    lines = [f"usage: {PROGRAM} COMMAND ...", ""]
    lines += [f"  {name:18} {line}" for name, (_, _, line) in COMMANDS.items()]
    return "\n".join([*lines, "", f"{PROGRAM} COMMAND --help shows the flags of a command; --version the version."])


def run(name: str, argv: Sequence[str]) -> int:
    """Run the command `name`. The exit status: its own, 1 after an error in one sentence, 130 when interrupted."""
    for variable, value in VARIABLES.get(name, {}).items():
        os.environ.setdefault(variable, value)
    if os.environ.get("MIXTRAL_FLAGS_ONLY") == "1":
        from megatron_mixtral.command_line import Parser

        Parser.flags_only = True
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # A full disk or an unreadable file is a sentence too; only in training it may be anything, and needs its traceback.
    expected = MixtralError if name in ("pretrain", "finetune") else (MixtralError, OSError)
    room, function, _ = COMMANDS[name]
    try:
        status = operator.attrgetter(function)(importlib.import_module(f"megatron_mixtral.{room}"))(argv)
        sys.stdout.flush()
        return status
    except expected as error:
        if isinstance(error, BrokenPipeError):  # who reads the output has enough of it, as `head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        print(f"error: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
