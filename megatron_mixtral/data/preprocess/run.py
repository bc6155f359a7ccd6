"""Preprocessing: text to the `.bin/.idx` pairs that the engine trains on.

    inputs -> chunks -> workers: read, parse, encode, write parts -> parent: parts in order -> {prefix}_{key}_document

`preprocess()` is the function, `main()` the command behind `tools/preprocess_data.py`. The output is the same, byte for
byte, for any number of workers, and for a run that was killed and taken up again. Files get their final names after
everything is encoded, counted and on disk; whatever ends a run earlier (an error, Ctrl-C, kill -9) leaves nothing under
these names, and keeps the finished parts in a hidden folder for the next run. Instruction data go another way,
`data/instruction/run.py`.
"""

import gc
import itertools
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_mixtral.data.cli import Options, parse_flags
from megatron_mixtral.data.corpus.files import REPORT_SUFFIX, Chunk, InputFiles, cut_chunks, list_inputs, take_shard
from megatron_mixtral.data.corpus.readers import LineCounts, read_records
from megatron_mixtral.data.corpus.records import BadRecord
from megatron_mixtral.data.preprocess.assemble import Assembly, output_prefix
from megatron_mixtral.data.preprocess.parts import FinishedParts
from megatron_mixtral.data.preprocess.report import Account, Progress, versions, write_json
from megatron_mixtral.data.preprocess.scratch import scratch_directory
from megatron_mixtral.data.preprocess.sentences import open_splitter
from megatron_mixtral.data.preprocess.workers import Job
from megatron_mixtral.data.processes import run_chunks
from megatron_mixtral.errors import MixtralError
from megatron_mixtral.tokenizer.encode import DocumentEncoder, special_tokens
from megatron_mixtral.tokenizer.engines.base import SpecialTokens, token_dtype
from megatron_mixtral.tokenizer.engines.choose import EngineChoice, choose_engine
from megatron_mixtral.tokenizer.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

PROOF_TEXTS, PROOF_CHARACTERS = 100, 1000  # the published tokenizers need 0.02 to 0.04 s for these


def preprocess(options: Options) -> dict[str, Any]:
    """Tokenize `options.inputs`; returns the report, which also lies in `{prefix}.report.json`.

    Raises:
        ConfigError: flags, paths or tokenizer that cannot work.
        DataError: a bad line (with `file:line`) unless such lines are skipped, no text at all, a worker that died, or
            counts that do not add up. No output is left then; an older output of the same name is kept.
    """
    with _no_collection():
        tokenizer = load_tokenizer(options.tokenizer_type, options.tokenizer_path)
    specials = special_tokens(tokenizer, options.prepend_bod, options.append_eod)
    if options.sentences:
        open_splitter(options.sentences)  # refuse before anything is read
    inputs = list_inputs(options.inputs)
    chunks = cut_chunks(inputs.files, options.chunk_bytes)
    if options.num_shards > 1:
        chunks = take_shard(chunks, options.shard_index, options.num_shards)
    total = sum(chunk.size for chunk in chunks)
    logger.info(
        "%d files, %.1f MB; tokenizer %s (%d ids, sha256 %s...)",
        len(inputs.files), total / 1e6, tokenizer.path, tokenizer.vocab_size, tokenizer.sha256[:12],
    )  # fmt: skip
    if inputs.ignored:
        shown = ", ".join(inputs.ignored[:3])
        logger.warning("%d files are not read because of their names: %s ...", len(inputs.ignored), shown)
    with _no_collection():
        choice = choose_engine(options.tokenizer_engine, tokenizer, first_texts(chunks, options.keys))
    logger.info("encoding with %s %s: %s", choice.engine.name, choice.engine.version, choice.reason)
    added = SpecialTokens(None, None) if options.sentences else specials
    encoder = DocumentEncoder(tokenizer, added, choice.engine, options.allow_special_in_text)
    prefix = options.shard_prefix
    with (
        scratch_directory(prefix) as scratch,
        closing(FinishedParts(scratch, made_with(options, tokenizer, choice))) as parts,
    ):
        job = Job(encoder, specials, options.keys, str(scratch), options.on_error == "skip", options.sentences)
        progress = Progress(total, options.log_interval)
        with closing(Assembly(chunks, job, prefix, encoder.dtype, parts, progress)) as assembly:
            # Closed at once on any error: the workers must be gone before their files go.
            with closing(run_chunks(assembly.unfinished, job, options.workers)) as results:
                assembly.collect(results)
            assembly.finish(may_be_empty=options.num_shards > 1)
            report_path = Path(prefix + REPORT_SUFFIX)
            report_path.unlink(missing_ok=True)
            assembly.publish()
        report = make_report(options, tokenizer, choice, inputs, assembly, progress)
        write_json(report_path, report)
    logger.info("done: %s", progress.line(assembly.account))
    for key, counts in report["keys"].items():
        logger.info("wrote %s.bin and .idx: %d documents, %d tokens",
                    output_prefix(prefix, key, options.sentences), counts["documents"], counts["tokens"])  # fmt: skip
    _log_left_out(assembly.account, report_path)
    return report


@contextmanager
def _no_collection() -> Iterator[None]:
    """Loading makes many objects and no garbage: looking for it takes a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def first_texts(chunks: Sequence[Chunk], keys: Sequence[str]) -> list[str]:
    """Beginnings of the first texts, on which the engine of encoding is proved. Bad lines are passed over."""
    return [text[:PROOF_CHARACTERS] for text in itertools.islice(_texts(chunks, keys), PROOF_TEXTS)]


def _texts(chunks: Sequence[Chunk], keys: Sequence[str]) -> Iterator[str]:
    for found in itertools.chain.from_iterable(read_records(chunk, keys, LineCounts()) for chunk in chunks):
        if not isinstance(found, BadRecord):  # the workers will come to those, with their places in the file
            yield from itertools.chain.from_iterable(zip(*found, strict=True))


def made_with(options: Options, tokenizer: Tokenizer, choice: EngineChoice) -> dict[str, Any]:
    """Everything besides its input that decides what a part holds: parts of a run with another are not taken up."""
    return {
        "format": 1,
        "tokenizer": f"{tokenizer.name} {tokenizer.sha256}",
        "--tokenizer-engine": f"{choice.engine.name} {choice.engine.version}",
        "--allow-special-in-text": options.allow_special_in_text,
        "--json-keys": list(options.keys),
        "--append-eod": options.append_eod,
        "--prepend-bod": options.prepend_bod,
        "--split-sentences": options.sentences and asdict(options.sentences),
        "versions": versions(),
    }


def make_report(
    options: Options,
    tokenizer: Tokenizer,
    choice: EngineChoice,
    inputs: InputFiles,
    assembly: Assembly,
    progress: Progress,
) -> dict[str, Any]:
    """Everything needed to know what is in the output: counts, inputs in order, tokenizer, flags, versions."""
    dtype = token_dtype(tokenizer.vocab_size)
    account = assembly.account
    report = account.as_dict()
    for key, counts in report["keys"].items():
        counts["output"] = output_prefix(options.shard_prefix, key, options.sentences)
        counts["dtype"] = dtype.name
        counts["bin_bytes"] = counts["tokens"] * dtype.itemsize
    return {
        **report,
        "seconds": round(progress.elapsed(), 3),
        "workers": options.workers,
        "append_eod": options.append_eod,
        "prepend_bod": options.prepend_bod,
        "split_sentences": options.sentences and asdict(options.sentences),
        "shard": {"index": options.shard_index, "count": options.num_shards} if options.num_shards > 1 else None,
        "pieces": {"all": assembly.pieces, "from_an_earlier_run": assembly.taken_up},
        "on_error": options.on_error,
        "tokenizer": {
            "name": tokenizer.name,
            "path": str(tokenizer.path),
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "allow_special_in_text": options.allow_special_in_text,
            **choice.as_dict(),
        },
        "inputs": [
            {"path": file.path, "bytes": file.size, "lines": account.lines_of(index)}
            for index, file in enumerate(inputs.files)
        ],
        "ignored_files": list(inputs.ignored),
        "versions": versions(),
    }


def _log_left_out(account: Account, report_path: Path) -> None:
    skipped = sum(account.counts.skipped.values())
    empty = sum(counts.empty for counts in account.per_key.values())
    if skipped or empty or account.counts.blank:
        logger.warning(
            "left out: %d bad lines %s, %d empty texts, %d blank lines; see %s",
            skipped, dict(account.counts.skipped) or "", empty, account.counts.blank, report_path,
        )  # fmt: skip


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """`tools/preprocess_data.py`: 0 when all is written and accounted for, 1 for an error, 130 when interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _interrupt) if in_main_thread else None
    try:
        options = parse_flags(argv, environ or {})
        if options.handler == "none":
            preprocess(options)
        else:
            from megatron_mixtral.data.instruction.run import (
                preprocess_instructions,  # takes time, and most runs need none
            )

            preprocess_instructions(options)
    except (MixtralError, OSError) as error:
        logger.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted: nothing is left under the output's name")
        return 130
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)
    return 0


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
