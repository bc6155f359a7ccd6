"""The commands of this room: `preprocess`, `merge`, `inspect-dataset`.

The flags of preprocessing are spelled as in Megatron-LM's tool and its forks, so that command lines written for these
run here. A flag that would change the data and is not implemented is refused, never ignored.
"""

import argparse
import logging
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mixtral.command_line import Parser
from megatron_mixtral.data.indexed import check_tokenizer, inspect, samples, tokenizer_of
from megatron_mixtral.data.indexed import merge as merge_datasets
from megatron_mixtral.data.instruction import HANDLER_NAMES, InstructionOptions
from megatron_mixtral.data.options import Options
from megatron_mixtral.data.preprocessing import run
from megatron_mixtral.data.text import TextOptions
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.tokenizer import TOKENIZER_TYPES, chat, load_tokenizer, mixtral_tokenizer_path
from megatron_mixtral.tokenizer.engines import ENGINES

logger = logging.getLogger(__name__)

FALLBACK_TYPES = ("PretrainedTokenizerFromHF", "PretrainedFromHF")
TEXT_FLAGS = {"keys": "--json-keys", "allow_special_in_text": "--allow-special-in-text", "num_shards": "--num-shards",
              "shard_index": "--shard-index", "tokenizer_engine": "--tokenizer-engine"}  # fmt: skip
INSTRUCTION_FLAGS = {"prompt_type": "--prompt-type", "seq_length": "--seq-length", "pack": "--pack",
                     "pad_to_multiple_of": "--pad-to-multiple-of"}  # fmt: skip


def preprocess(argv: Sequence[str]) -> int:
    """Tokenize: 0 when all is written and accounted for. Ctrl-C and SIGTERM end it with KeyboardInterrupt."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler) if in_main_thread else None
    try:
        run(parse_flags(argv, os.environ))
    except KeyboardInterrupt:
        logger.error("nothing is left under the output's name")
        raise
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)
    return 0


def default_workers() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_parser() -> Parser:
    """Flags of one kind of data have no default here: only those that are given go to its options."""
    parser = Parser(
        description="Tokenize JSON lines into {prefix}_{key}_document.bin/.idx for pretraining, or dialogues into "
        "data sets for fine-tuning.",
        allow_abbrev=False,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders, glob patterns")
    data.add_argument("--json-keys", "--json_keys", nargs="+", default=argparse.SUPPRESS, metavar="KEY", dest="keys",
                      help="keys whose texts are tokenized, one dataset each (default: text)")  # fmt: skip
    data.add_argument("--on-error", choices=["stop", "skip"], default="stop",
                      help="at a bad line: stop with file:line (default), or leave it out and count it")  # fmt: skip
    data.add_argument("--output-prefix", required=True, metavar="PREFIX", help="path and first part of the names")
    data.add_argument("--dataset-impl", default="mmap", metavar="mmap", help="mmap, the only one that the engine reads")
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument("--tokenizer-type", required=True, metavar="TYPE", help=", ".join(TOKENIZER_TYPES))
    tokenizer.add_argument("--tokenizer-model", nargs="?", metavar="PATH",
                           help="directory with tokenizer.json or tokenizer.model, or such a file; empty: "
                           "$MIXTRAL_HUGGINGFACE_PATH, else the Mixtral tokenizer of mistral-common")  # fmt: skip
    tokenizer.add_argument("--tokenizer-name-or-path", nargs="?", metavar="PATH", help="the same as --tokenizer-model")
    tokenizer.add_argument("--tokenizer-not-use-fast", action="store_true",
                           help="accepted; changes nothing: fast and slow give the same ids here")  # fmt: skip
    tokenizer.add_argument("--tokenizer-engine", default=argparse.SUPPRESS, metavar="ENGINE",
                           help=f"what encodes: {', '.join(ENGINES)}; native is our C++ extension, fastokens comes "
                           "with the extra [fast]; auto (default): the fastest whose ids are proved right")  # fmt: skip
    tokenizer.add_argument("--allow-special-in-text", action="store_true", default=argparse.SUPPRESS,
                           help="control strings in a text, such as </s>, become control ids; without it they are "
                           "text")  # fmt: skip
    tokenizer.add_argument("--append-eod", action="store_true", help="end every document with the EOS id")
    tokenizer.add_argument("--prepend-bod", action="store_true", help="begin every document with the BOS id")
    process = parser.add_argument_group("run")
    process.add_argument("--workers", type=int, default=default_workers(), help="processes (default here: %(default)s)")
    process.add_argument("--log-interval", type=int, default=1000, metavar="N", help="progress every N documents")
    process.add_argument("--num-shards", type=int, default=argparse.SUPPRESS, metavar="N",
                     help="split the corpus over N runs; tools/merge_datasets.py joins what they write")  # fmt: skip
    process.add_argument("--shard-index", type=int, default=argparse.SUPPRESS, metavar="I",
                     help="which of them this is: 0 to N - 1")  # fmt: skip
    for gone in ("--split-sentences", "--keep-newlines"):
        process.add_argument(gone, action="store_true", help=argparse.SUPPRESS)
    process.add_argument("--lang", help=argparse.SUPPRESS)
    instruction = parser.add_argument_group("instruction data (docs/instruction_data.md)")
    instruction.add_argument("--handler-name", default="none", metavar="NAME",
                             help=f"form of the records: none, {', '.join(HANDLER_NAMES)}")  # fmt: skip
    instruction.add_argument("--prompt-type", metavar="TYPE", default=argparse.SUPPRESS,
                             help=f"how a conversation is written: {', '.join(chat.TEMPLATES)} (default: modellink "
                             "with GeneralInstructionHandler, raw with pretrain, else mixtral)")  # fmt: skip
    instruction.add_argument("--seq-length", type=int, metavar="N", default=argparse.SUPPRESS,
                             help="length of a row in training; longer samples are left out and counted")  # fmt: skip
    instruction.add_argument("--pack", action="store_true", default=argparse.SUPPRESS,
                             help="put several samples into a row of --seq-length")  # fmt: skip
    instruction.add_argument("--pad-to-multiple-of", type=int, metavar="N", default=argparse.SUPPRESS,
                             help="with --pack: leave room for padding each sample to a multiple of N, which training "
                             "with context parallelism does: 2 x its --context-parallel-size")  # fmt: skip
    return parser


def parse_flags(argv: Sequence[str], environ: Mapping[str, str]) -> Options:
    """Flags to options; `environ` is where `MIXTRAL_HUGGINGFACE_PATH` is looked up.

    Raises `ConfigError` for flags that contradict each other or ask for what is not there; unknown flags end the
    process with status 2, as argparse does.
    """
    flags = make_parser().parse_args(argv)
    if flags.split_sentences or flags.keep_newlines or flags.lang:
        raise ConfigError("--split-sentences, --keep-newlines and --lang are gone, since Mixtral is trained on whole "
                          "documents: leave them out, or write each sentence as a record of its own beforehand.")
    if flags.dataset_impl != "mmap":
        raise ConfigError(f"--dataset-impl {flags.dataset_impl}: only mmap is written; the engine reads nothing else.")
    if flags.tokenizer_type not in TOKENIZER_TYPES:
        raise ConfigError(f"--tokenizer-type {flags.tokenizer_type} is not one of: {', '.join(TOKENIZER_TYPES)}.")
    given = vars(flags)
    text, instruction = ({name: given[name] for name in names if name in given}
                         for names in (TEXT_FLAGS, INSTRUCTION_FLAGS))  # fmt: skip
    names = ("output_prefix", "tokenizer_type", "append_eod", "prepend_bod", "workers", "on_error", "log_interval")
    common: dict[str, Any] = {name: given[name] for name in names}
    if flags.handler_name.lower() == "none":
        if instruction:
            wrong = " and ".join(INSTRUCTION_FLAGS[name] for name in instruction)
            raise ConfigError(f"{wrong}: for instruction data only; give --handler-name too.")
        make: Any = TextOptions
        specific = text | ({"keys": tuple(text["keys"])} if "keys" in text else {})
    else:
        text.pop("tokenizer_engine", None)  # dialogues are always encoded by the published tokenizer
        if text:
            wrong = " and ".join(TEXT_FLAGS[name] for name in text)
            raise ConfigError(f"{wrong}: for plain text; with --handler-name {flags.handler_name} it has no meaning.")
        make, specific = InstructionOptions, {**instruction, "handler": flags.handler_name}
    return make(inputs=tuple(flags.input), tokenizer_path=_tokenizer_path(flags, environ), **common, **specific)


def _tokenizer_path(flags: argparse.Namespace, environ: Mapping[str, str]) -> str:
    """The given path; for an empty one, and a type read from a Hugging Face folder, a default that is named loudly."""
    given = [path for path in (flags.tokenizer_model, flags.tokenizer_name_or_path) if path]
    if len(given) == 2 and Path(given[0]).resolve() != Path(given[1]).resolve():
        raise ConfigError(f"--tokenizer-model {given[0]} and --tokenizer-name-or-path {given[1]} differ: give one.")
    if given:
        return given[0]
    if flags.tokenizer_type not in FALLBACK_TYPES:
        raise ConfigError(f"--tokenizer-type {flags.tokenizer_type} needs --tokenizer-model with a path.")
    if from_environment := environ.get("MIXTRAL_HUGGINGFACE_PATH"):
        logger.warning("--tokenizer-model is empty: using MIXTRAL_HUGGINGFACE_PATH, %s", from_environment)
        return from_environment
    path = mixtral_tokenizer_path()
    logger.warning("--tokenizer-model is empty: using the Mixtral-8x7B-v0.1 tokenizer of mistral-common, %s", path)
    return str(path)


def merge(argv: Sequence[str]) -> int:
    """Merge indexed data sets into one: 0 when it is written."""
    parser = Parser(allow_abbrev=False, description="Merge indexed datasets into one.")
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="datasets, with or without .idx")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="the new dataset, without an ending")
    parser.add_argument("--order", choices=["natural", "given"], default="natural",
                        help="natural order of the names (default), or as given")  # fmt: skip
    flags = parser.parse_args(argv)
    report = merge_datasets(flags.input, flags.output_prefix, flags.order == "natural")
    print(f"wrote {flags.output_prefix}: {report['documents']} documents, {report['tokens']} tokens")
    return 0


def inspect_dataset(argv: Sequence[str]) -> int:
    """Show and check an indexed data set: 0 for one that is whole, 1 with sentences for one that is not."""
    parser = Parser(allow_abbrev=False, description="Show and check an indexed dataset.")
    parser.add_argument("prefix", metavar="PREFIX", help="the dataset, with or without .idx")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="decode the beginnings of N sequences")
    parser.add_argument("--tokenizer-model", metavar="PATH", help="default: the one that the report names")
    flags = parser.parse_args(argv)
    path = flags.tokenizer_model
    if path is None and flags.show and (noted := tokenizer_of(flags.prefix)):
        path = noted["path"]
    if path is None and flags.show:
        raise ConfigError("--show needs --tokenizer-model: no report beside the dataset names one.")
    tokenizer = load_tokenizer("HuggingFaceTokenizer", path) if path else None
    if tokenizer:
        check_tokenizer(flags.prefix, tokenizer)
    found = inspect(flags.prefix, tokenizer.vocab_size if tokenizer else None)
    print(found)
    for sample in samples(flags.prefix, tokenizer, flags.show) if tokenizer else ():
        print(sample)
    return 1 if found.problems else 0
