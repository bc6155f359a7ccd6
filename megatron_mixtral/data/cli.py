"""The flags of `tools/preprocess_data.py`, and what they mean together.

Their spellings are those of Megatron-LM's tool and its forks, so that command lines written for these run here. A flag
that would change the data and is not implemented is refused, never ignored.
"""

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mixtral.data.instruction.formats import HANDLERS
from megatron_mixtral.data.preprocess.sentences import SentenceRule
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.tokenizer.chat import TEMPLATES
from megatron_mixtral.tokenizer.engines.choose import ENGINES
from megatron_mixtral.tokenizer.tokenizer import TOKENIZER_TYPES, mixtral_tokenizer_path

logger = logging.getLogger(__name__)

HANDLER_NAMES = ("none", "auto", *HANDLERS)
# The form in which ModelLink's handler writes a sample, plain text as it stands, and Mixtral's for all others.
DEFAULT_PROMPT_TYPES = {"GeneralInstructionHandler": "modellink", "pretrain": "raw"}
FALLBACK_TYPES = ("PretrainedTokenizerFromHF", "PretrainedFromHF")


@dataclass(frozen=True)
class Options:
    """A preprocessing run, validated. `chunk_bytes` bounds the input that a worker takes at a time.

    With a `handler` other than none the records are instruction data, written as `prompt_type` says; `seq_length` drops
    longer samples and is the size of a pack (`pack`).
    """

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer_path: str
    tokenizer_type: str = "HuggingFaceTokenizer"
    tokenizer_engine: str = "auto"
    allow_special_in_text: bool = False
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    prepend_bod: bool = False
    workers: int = 1
    on_error: str = "stop"
    log_interval: int = 1000
    chunk_bytes: int = 4 << 20
    sentences: SentenceRule | None = None
    num_shards: int = 1
    shard_index: int = 0
    handler: str = "none"
    prompt_type: str = "mixtral"
    seq_length: int | None = None
    pack: bool = False

    @property
    def shard_prefix(self) -> str:
        """The output prefix, with the number of the shard where there is more than one."""
        if self.num_shards == 1:
            return self.output_prefix
        return f"{self.output_prefix}-{self.shard_index:05d}-of-{self.num_shards:05d}"

    def __post_init__(self) -> None:
        """Raises `ConfigError` for values that cannot work."""
        if not os.path.basename(self.output_prefix):
            raise ConfigError(f"--output-prefix {self.output_prefix!r} must end in a name, such as DIR/common_crawl.")
        if len(set(self.keys)) != len(self.keys) or not self.keys:
            raise ConfigError(f"--json-keys {' '.join(self.keys)}: give at least one key, and each once.")
        for key in self.keys:
            if not key or os.sep in key or "\0" in key:
                raise ConfigError(f"--json-keys {key!r} cannot be part of a file name ({{prefix}}_{{key}}_document).")
        if self.workers < 1 or self.log_interval < 1 or self.chunk_bytes < 1:
            raise ConfigError("--workers and --log-interval must be at least 1.")
        if not 0 <= self.shard_index < self.num_shards:
            raise ConfigError(
                f"--shard-index {self.shard_index} must be from 0 to {self.num_shards - 1} (--num-shards - 1)."
            )
        if self.on_error not in ("stop", "skip"):
            raise ConfigError(f"--on-error {self.on_error} is neither stop nor skip.")
        self._check_instruction()

    def _check_instruction(self) -> None:
        if self.handler not in HANDLER_NAMES:
            raise ConfigError(f"--handler-name {self.handler} is not one of: {', '.join(HANDLER_NAMES)}.")
        if self.prompt_type not in TEMPLATES:
            raise ConfigError(f"--prompt-type {self.prompt_type} is not one of: {', '.join(TEMPLATES)}.")
        if self.handler == "none" and (self.seq_length is not None or self.pack):
            raise ConfigError("--seq-length and --pack are for instruction data: give --handler-name too.")
        if self.pack and self.seq_length is None:
            raise ConfigError("--pack needs --seq-length, the length of a row in training.")
        if self.seq_length is not None and self.seq_length < 1:
            raise ConfigError(f"--seq-length {self.seq_length} must be at least 1.")
        plain = {"--split-sentences": self.sentences, "--num-shards": self.num_shards > 1,
                 "--allow-special-in-text": self.allow_special_in_text}
        for flag, given in plain.items():
            if given and self.handler != "none":
                raise ConfigError(f"{flag} is for plain text; with --handler-name {self.handler} it has no meaning.")



def default_workers() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Tokenize JSON lines into {prefix}_{key}_document.bin/.idx for pretraining.",
        allow_abbrev=False,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders, glob patterns")
    data.add_argument("--json-keys", "--json_keys", nargs="+", default=["text"], metavar="KEY", dest="json_keys",
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
    tokenizer.add_argument("--tokenizer-engine", choices=ENGINES, default="auto",
                           help="what encodes: native (our C++ extension), gigatoken (extra [fast]), tokenizers, "
                           "sentencepiece; auto (default): the fastest whose ids are proved right")  # fmt: skip
    tokenizer.add_argument("--allow-special-in-text", action="store_true",
                           help="control strings in a text, such as </s>, become control ids; without it they are "
                           "text")  # fmt: skip
    tokenizer.add_argument("--append-eod", action="store_true", help="end every document with the EOS id")
    tokenizer.add_argument("--prepend-bod", action="store_true", help="begin every document with the BOS id")
    run = parser.add_argument_group("run")
    run.add_argument("--workers", type=int, default=default_workers(), help="processes (default here: %(default)s)")
    run.add_argument("--log-interval", type=int, default=1000, metavar="N", help="progress every N documents")
    run.add_argument("--num-shards", type=int, default=1, metavar="N",
                     help="split the corpus over N runs; tools/merge_datasets.py joins what they write")  # fmt: skip
    run.add_argument("--shard-index", type=int, default=0, metavar="I", help="which of them this is: 0 to N - 1")
    sentences = parser.add_argument_group("sentences")
    sentences.add_argument("--split-sentences", action="store_true",
                           help="each sentence is a sequence of its document (nltk's Punkt)")  # fmt: skip
    sentences.add_argument("--keep-newlines", action="store_true",
                           help="with --split-sentences: white space after a sentence stays with it")  # fmt: skip
    sentences.add_argument("--lang", default="english", help="Punkt's language (default: %(default)s)")
    instruction = parser.add_argument_group("instruction data (docs/instruction_data.md)")
    instruction.add_argument("--handler-name", default="none", metavar="NAME",
                             help=f"form of the records: {', '.join(HANDLER_NAMES)}")  # fmt: skip
    instruction.add_argument("--prompt-type", metavar="TYPE",
                             help=f"how a conversation is written: {', '.join(TEMPLATES)} (default: modellink with "
                             "GeneralInstructionHandler, raw with pretrain, else mixtral)")  # fmt: skip
    instruction.add_argument("--seq-length", type=int, metavar="N",
                             help="length of a row in training; longer samples are left out and counted")  # fmt: skip
    instruction.add_argument("--pack", action="store_true", help="put several samples into a row of --seq-length")
    return parser


def parse_flags(argv: Sequence[str] | None, environ: Mapping[str, str]) -> Options:
    """Flags to `Options`; `environ` is where `MIXTRAL_HUGGINGFACE_PATH` is looked up.

    Raises `ConfigError` for flags that contradict each other or ask for what is not there; unknown flags end the
    process with status 2, as argparse does.
    """
    flags = make_parser().parse_args(argv)
    if flags.dataset_impl != "mmap":
        raise ConfigError(f"--dataset-impl {flags.dataset_impl}: only mmap is written; the engine reads nothing else.")
    handler = "none" if flags.handler_name.lower() == "none" else flags.handler_name
    if handler == "none" and flags.prompt_type is not None:
        raise ConfigError("--prompt-type is for instruction data: give --handler-name too.")
    if flags.tokenizer_type not in TOKENIZER_TYPES:
        raise ConfigError(f"--tokenizer-type {flags.tokenizer_type} is not one of: {', '.join(TOKENIZER_TYPES)}.")
    return Options(
        inputs=tuple(flags.input),
        output_prefix=flags.output_prefix,
        tokenizer_path=_tokenizer_path(flags, environ),
        tokenizer_type=flags.tokenizer_type,
        tokenizer_engine=flags.tokenizer_engine,
        allow_special_in_text=flags.allow_special_in_text,
        keys=tuple(flags.json_keys),
        append_eod=flags.append_eod,
        prepend_bod=flags.prepend_bod,
        workers=flags.workers,
        on_error=flags.on_error,
        log_interval=flags.log_interval,
        sentences=SentenceRule(flags.lang, flags.keep_newlines) if flags.split_sentences else None,
        num_shards=flags.num_shards,
        shard_index=flags.shard_index,
        handler=handler,
        prompt_type=flags.prompt_type or DEFAULT_PROMPT_TYPES.get(handler, "mixtral"),
        seq_length=flags.seq_length,
        pack=flags.pack,
    )


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


def preprocess(argv: Sequence[str]) -> int:
    """Tokenize text or dialogues."""
    from megatron_mixtral.data.preprocess.run import main

    return main(argv, os.environ)


def merge(argv: Sequence[str]) -> int:
    """Join indexed datasets."""
    from megatron_mixtral.data.indexed.merge import merge

    parser = argparse.ArgumentParser(allow_abbrev=False,
                                     description="Merge indexed datasets into one.")  # fmt: skip
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="datasets, with or without .idx")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="the new dataset, without an ending")
    parser.add_argument("--order", choices=["natural", "given"], default="natural",
                        help="natural order of the names (default), or as given")  # fmt: skip
    args = parser.parse_args(argv)
    report = merge(args.input, args.output_prefix, args.order == "natural")
    print(f"wrote {args.output_prefix}: {report['documents']} documents, {report['tokens']} tokens")
    return 0


def inspect_dataset(argv: Sequence[str]) -> int:
    """Show and check an indexed dataset."""
    from megatron_mixtral.data.indexed import inspection
    from megatron_mixtral.tokenizer.tokenizer import load_tokenizer

    parser = argparse.ArgumentParser(allow_abbrev=False,
                                     description="Show and check an indexed dataset.")  # fmt: skip
    parser.add_argument("prefix", metavar="PREFIX", help="the dataset, with or without .idx")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="decode the beginnings of N sequences")
    parser.add_argument("--tokenizer-model", metavar="PATH", help="default: the one that the report names")
    args = parser.parse_args(argv)
    path = args.tokenizer_model
    if path is None and args.show and (noted := inspection.tokenizer_of(args.prefix)):
        path = noted["path"]
    if path is None and args.show:
        raise ConfigError("--show needs --tokenizer-model: no report beside the dataset names one.")
    tokenizer = load_tokenizer("HuggingFaceTokenizer", path) if path else None
    if tokenizer:
        inspection.check_tokenizer(args.prefix, tokenizer)
    found = inspection.inspect(args.prefix, tokenizer.vocab_size if tokenizer else None)
    print(found)
    for sample in inspection.samples(args.prefix, tokenizer, args.show) if tokenizer else ():
        print(sample)
    return 1 if found.problems else 0
