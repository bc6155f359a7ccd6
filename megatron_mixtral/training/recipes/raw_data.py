"""What a recipe says of raw data: its flags, and the data set that is made of them once, in SAVE/data.

A set's name has a hash of all that it depends on: what is in the files and in the tokenizer, form, template and length.
So an equal one is used again, and another never is.
"""

import dataclasses
import hashlib
import json
import logging
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_mixtral import disk
from megatron_mixtral.command_line import Parser
from megatron_mixtral.data import default_workers
from megatron_mixtral.data.corpus import list_inputs
from megatron_mixtral.data.datasets import instruction_blend
from megatron_mixtral.data.indexed import tokenizer_of
from megatron_mixtral.data.instruction import InstructionOptions, preprocess_instructions
from megatron_mixtral.errors import ConfigError, DataError, MixtralError
from megatron_mixtral.tokenizer import chat, chat_prompts, load_tokenizer
from megatron_mixtral.training.checkpoints import lease

logger = logging.getLogger(__name__)

KEY = "KEY"  # in a dry run, in the place of a hash of files that are not there yet
_SECONDS = 0.5  # between looks for a data set that another process makes
_FAILED = ".failed"  # behind a set's prefix: why rank 0 of a start could not make it


def add_flags(parser: Parser) -> Parser:
    """Add the flags of raw data: those of `preprocess` that have a place here, and the questions of an evaluation."""
    parser.add_argument("--input", nargs="+")
    parser.add_argument("--handler-name", default="auto")
    parser.add_argument("--prompt-type")
    parser.add_argument("--pack", action="store_true")
    parser.add_argument("--append-eod", action="store_true")
    parser.add_argument("--on-error", default="stop")
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--evaluation-questions", nargs="+")
    return parser


def split(words: Sequence[str]) -> tuple[Namespace, list[str]]:
    """(the flags of raw data, all other words): the others are for the training program."""
    return add_flags(Parser(add_help=False, allow_abbrev=False)).parse_known_args(words)


def options(raw: Namespace, tokenizer: str, seq_length: int, multiple: int = 1) -> InstructionOptions:
    """Preprocessing as the flags ask for it, as yet without a place. Training pads each sample to a `multiple` of
    positions, for which packed rows leave room. `ConfigError` for what cannot be.
    """
    return InstructionOptions(
        tuple(raw.input or ()), "data", tokenizer, append_eod=raw.append_eod, workers=raw.workers,
        on_error=raw.on_error, handler=raw.handler_name, prompt_type=raw.prompt_type, seq_length=seq_length,
        pack=raw.pack, pad_to_multiple_of=multiple if raw.pack else 1)


def placed(wanted: InstructionOptions, folder: Path, planned: bool = False) -> InstructionOptions:
    """The same with its output prefix in `folder`, named after the first file and the hash. Where it is only `planned`,
    files and tokenizer may be missing. `ConfigError` where they may not, and are.
    """
    try:
        name = _key(wanted)
    except (ConfigError, DataError):
        if not planned:
            raise
        name = KEY
    stem = Path(wanted.inputs[0]).name.partition(".")[0]
    return dataclasses.replace(wanted, output_prefix=str(folder / f"{stem}-{name}"))


def _key(wanted: InstructionOptions) -> str:
    files = [file.path for file in list_inputs(wanted.inputs).files]
    tokenizer = load_tokenizer(wanted.tokenizer_type, wanted.tokenizer_path)
    facts = [[_sha256(file) for file in files], tokenizer.sha256, repr(chat.TEMPLATES[wanted.template_name]),
             wanted.seq_length, wanted.handler, wanted.pack, wanted.append_eod, wanted.on_error,
             wanted.pad_to_multiple_of]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _sha256(file: str) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make(wanted: InstructionOptions, first: bool, me: lease.Holder) -> None:
    """Preprocess, unless the set is there. The `first` process of a start does it, the others wait for it. Errors as
    `preprocess_instructions`: where the first has one, `DataError` with its sentence in all others of `me`'s job.
    """
    prefix = wanted.output_prefix
    if first:
        with _told(prefix, me):
            if is_whole(prefix):
                logger.info("data    %s is there already, of these files, tokenizer, template and length", prefix)
            else:
                preprocess_instructions(wanted)
        return
    if not is_whole(prefix):
        logger.info("waits for rank 0, which preprocesses into %s; every node has to see that folder", prefix)
    # A note that is there already is of an earlier start, which rank 0 takes away, if both can have the same name.
    before, began = _failure(prefix, me) if me.may_recur else None, time.monotonic()
    while not is_whole(prefix):
        why = _failure(prefix, me)
        if why is not None and (why != before or time.monotonic() - began > lease.STILL):
            raise DataError(why[1])
        time.sleep(_SECONDS)


@contextmanager
def _told(prefix: str, me: lease.Holder) -> Iterator[None]:
    """Leave a note of what goes wrong in the context, for the ranks that wait: srun ends none of them when another
    fails. A note of an earlier start is taken away first.
    """
    note = Path(prefix + _FAILED)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        sentence = str(error) if isinstance(error, MixtralError) else (
            f"rank 0 could not make {prefix}: {type(error).__name__}: {error}")
        with suppress(OSError):  # of a full disk, say: the error itself is what counts
            disk.write_whole(note, json.dumps({"sentence": sentence, "rank 0": dataclasses.asdict(me)}))
        raise


def _failure(prefix: str, me: lease.Holder) -> tuple[str, str] | None:
    """(the token of rank 0 of this start, its sentence), where it has left a note."""
    try:
        found = json.loads(Path(prefix + _FAILED).read_text(encoding="utf-8"))
    except OSError:
        return None
    first = lease.Holder(**found["rank 0"])
    return (first.token, found["sentence"]) if lease.same_start(first, me) else None


def is_whole(prefix: str) -> bool:
    """Whether the set has been written to its end: the report, which comes last, and its files."""
    try:
        instruction_blend([prefix])
    except DataError:
        return False
    return tokenizer_of(f"{prefix}_packed_input_ids_document") is not None


def command(wanted: InstructionOptions) -> list[str]:
    """The words of `megatron-mixtral` that preprocess so."""
    words = ["preprocess", "--input", *wanted.inputs, "--output-prefix", wanted.output_prefix, "--tokenizer-type",
             "PretrainedFromHF", "--tokenizer-model", wanted.tokenizer_path, "--handler-name", wanted.handler,
             "--prompt-type", wanted.template_name, "--seq-length", str(wanted.seq_length), "--on-error",
             wanted.on_error]
    if wanted.pad_to_multiple_of > 1:
        words += ["--pad-to-multiple-of", str(wanted.pad_to_multiple_of)]
    return words + ["--pack"] * wanted.pack + ["--append-eod"] * wanted.append_eod


@dataclass(frozen=True)
class Questions:
    """Questions of an evaluation, to be written as prompts for `--evaluation-prompts`."""

    texts: tuple[str, ...]
    template: str
    tokenizer: str
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "evaluation_questions.jsonl"

    def write(self) -> None:
        """Write the file, each question in ids as the template has it up to its answer. Every process may."""
        prompts = chat_prompts(load_tokenizer("HuggingFaceTokenizer", self.tokenizer), self.tokenizer, self.template)
        lines = [json.dumps({"prompt": prompts.prompt([{"role": "user", "content": text}])}) for text in self.texts]
        self.folder.mkdir(parents=True, exist_ok=True)
        disk.write_whole(self.file, "\n".join(lines) + "\n")
