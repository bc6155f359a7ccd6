"""Plain text to the `.bin/.idx` pairs that the engine trains on.

    inputs -> chunks -> workers: read, parse, encode, write parts -> parent: parts in order -> {prefix}_{key}_document

The output is the same, byte for byte, for any number of workers, and for a run that was killed and taken up again.
Files get their final names after everything is encoded, counted and on disk; whatever ends a run earlier (an error,
Ctrl-C, kill -9) leaves nothing under these names, and keeps the finished parts in a hidden folder for the next run.
"""

import gc
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from megatron_mixtral.data.corpus import BadRecord, Chunk, LineCounts, cut_chunks, list_inputs, read_records
from megatron_mixtral.data.processes import run_tasks
from megatron_mixtral.data.report import publish, report_path, tokenizer_facts, versions
from megatron_mixtral.data.scratch import scratch_directory
from megatron_mixtral.data.text.account import Progress, TextAccount
from megatron_mixtral.data.text.assemble import Assembly, output_prefix
from megatron_mixtral.data.text.options import TextOptions
from megatron_mixtral.data.text.parts import FinishedParts
from megatron_mixtral.data.text.workers import ChunkEncoder
from megatron_mixtral.tokenizer import DocumentEncoder, Tokenizer, load_tokenizer, special_tokens
from megatron_mixtral.tokenizer.engines import EngineChoice, choose_engine

logger = logging.getLogger(__name__)

PROOF_TEXTS, PROOF_CHARACTERS = 100, 1000  # the published tokenizers need 0.02 to 0.04 s for these
BYTES_OF_A_TOKEN = 4  # of text, about; only for the error of a full disk


def preprocess_text(options: TextOptions) -> dict[str, Any]:
    """Tokenize `options.inputs`; returns the report, which also lies in `reports/` beside the data sets.

    Raises:
        ConfigError: flags, paths or tokenizer that cannot work.
        DataError: a bad line (with `file:line`) unless such lines are skipped, no text at all, a worker that died, or
            counts that do not add up. No output is left then; an older output of the same name is kept.
    """
    with _no_collection():
        tokenizer = load_tokenizer(options.tokenizer_type, options.tokenizer_path)
    specials = special_tokens(tokenizer, options.prepend_bod, options.append_eod)
    inputs = list_inputs(options.inputs)
    chunks = cut_chunks(inputs.files, options.chunk_bytes, options.shard_index, options.num_shards)
    total = sum(chunk.size for chunk in chunks)
    logger.info(
        "%d files, %.1f MB; tokenizer %s (%d ids, sha256 %s...)",
        len(inputs.files), total / 1e6, tokenizer.path, tokenizer.vocab_size, tokenizer.sha256[:12],
    )  # fmt: skip
    with _no_collection():
        choice = choose_engine(options.tokenizer_engine, tokenizer, first_texts(chunks, options.keys))
    logger.info("encoding with %s %s: %s", choice.engine.name, choice.engine.version, choice.reason)
    encoder = DocumentEncoder(tokenizer, specials, choice.engine, options.allow_special_in_text)
    prefix, sharded = options.shard_prefix, options.num_shards > 1
    with (
        scratch_directory(prefix, total * encoder.dtype.itemsize * len(options.keys) // BYTES_OF_A_TOKEN) as scratch,
        closing(FinishedParts(scratch, made_with(options, tokenizer, choice))) as parts,
    ):
        work = ChunkEncoder(encoder, options.keys, str(scratch), options.skip_bad)
        progress = Progress(total, options.log_interval)
        with closing(Assembly(chunks, work, prefix, parts, progress)) as assembly:
            # Closed at once on any error: the workers must be gone before their files go.
            workers = min(options.workers, len(assembly.unfinished))
            with closing(run_tasks(assembly.unfinished, work, workers)) as results:
                assembly.collect(results)
            assembly.finish(may_be_empty=sharded)
            account = assembly.account
            report = {
                **_facts(account, prefix, encoder),
                "seconds": round(progress.elapsed(), 3),
                "workers": options.workers,
                "append_eod": options.append_eod,
                "prepend_bod": options.prepend_bod,
                "shard": {"index": options.shard_index, "count": options.num_shards} if sharded else None,
                "pieces": {"all": assembly.pieces, "from_an_earlier_run": assembly.taken_up},
                "on_error": options.on_error,
                "tokenizer": {
                    **tokenizer_facts(tokenizer),
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
            publish(assembly.writers, prefix, report)
    logger.info("done: %s", progress.line(account))
    for counts in report["keys"].values():
        logger.info("wrote %s.bin and .idx: %d documents, %d tokens",
                    counts["output"], counts["documents"], counts["tokens"])  # fmt: skip
    _log_left_out(account, report_path(prefix))
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


def first_texts(chunks: Sequence[Chunk], keys: tuple[str, ...]) -> list[str]:
    """Beginnings of the first texts, on which the engine of encoding is proved. Bad lines are passed over."""
    return [text[:PROOF_CHARACTERS] for text in itertools.islice(_texts(chunks, keys), PROOF_TEXTS)]


def _texts(chunks: Sequence[Chunk], keys: tuple[str, ...]) -> Iterator[str]:
    for found in itertools.chain.from_iterable(read_records(chunk, keys, LineCounts()) for chunk in chunks):
        if not isinstance(found, BadRecord):  # the workers will come to those, with their places in the file
            yield from itertools.chain.from_iterable(zip(*found, strict=True))


def made_with(options: TextOptions, tokenizer: Tokenizer, choice: EngineChoice) -> dict[str, Any]:
    """Everything besides its input that decides what a part holds: parts of a run with another are not taken up."""
    return {
        "format": 2,
        "tokenizer": f"{tokenizer.name} {tokenizer.sha256}",
        "--tokenizer-engine": f"{choice.engine.name} {choice.engine.version}",
        "--allow-special-in-text": options.allow_special_in_text,
        "--json-keys": list(options.keys),
        "--append-eod": options.append_eod,
        "--prepend-bod": options.prepend_bod,
        "versions": versions(),
    }


def _facts(account: TextAccount, prefix: str, encoder: DocumentEncoder) -> dict[str, Any]:
    """The counts, and of each key the data set that was written."""
    report = account.as_dict()
    for key, counts in report["keys"].items():
        counts["output"] = output_prefix(prefix, key)
        counts["dtype"] = encoder.dtype.name
        counts["bin_bytes"] = counts["tokens"] * encoder.dtype.itemsize
    return report


def _log_left_out(account: TextAccount, report: Path) -> None:
    empty = sum(counts.empty for counts in account.per_key.values())
    if account.skipped or empty or account.lines.blank:
        logger.warning(
            "left out: %d bad lines %s, %d empty texts, %d blank lines; see %s",
            account.skipped.total(), dict(account.skipped) or "", empty, account.lines.blank, report,
        )  # fmt: skip
