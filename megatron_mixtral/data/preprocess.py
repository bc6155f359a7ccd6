"""Preprocessing: JSON lines to the `.bin/.idx` pairs that the engine trains on.

    inputs -> chunks -> workers: read, parse, encode, write parts -> parent: parts in order -> {prefix}_{key}_document

`preprocess()` is the function, `main()` the command behind `tools/preprocess_data.py`. The output is the same, byte for
byte, for any number of workers. Files get their final names after everything is encoded, counted and on disk; whatever
ends a run earlier (an error, Ctrl-C, kill -9) leaves nothing under these names.
"""

import fcntl
import itertools
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_mixtral.data.encoding import DocumentEncoder, special_tokens, token_dtype
from megatron_mixtral.data.engines.choose import EngineChoice, choose_engine
from megatron_mixtral.data.indexed import IndexedWriter
from megatron_mixtral.data.preprocess_flags import Options, parse_flags
from megatron_mixtral.data.readers import (
    REPORT_SUFFIX,
    BadRecord,
    Chunk,
    InputFiles,
    LineCounts,
    cut_chunks,
    list_inputs,
    parse_record,
    read_lines,
)
from megatron_mixtral.data.report import Account, Progress, versions, write_json
from megatron_mixtral.data.tokenizer import Tokenizer, load_tokenizer
from megatron_mixtral.data.workers import ChunkResult, Job, part_paths, run_chunks
from megatron_mixtral.errors import ConfigError, MixtralError

logger = logging.getLogger(__name__)

PROOF_LINES, PROOF_CHARACTERS = 200, 200_000  # of the corpus; the published tokenizers need up to 0.2 s for these


def output_prefix(prefix: str, key: str) -> str:
    """Where the documents of one key go: `{prefix}_{key}_document`, to which `.bin` and `.idx` are added."""
    return f"{prefix}_{key}_document"


def preprocess(options: Options) -> dict[str, Any]:
    """Tokenize `options.inputs`; returns the report, which also lies in `{prefix}.report.json`.

    Raises:
        ConfigError: flags, paths or tokenizer that cannot work.
        DataError: a bad line (with `file:line`) unless such lines are skipped, no text at all, a worker that died, or
            counts that do not add up. No output is left then; an older output of the same name is kept.
    """
    tokenizer = load_tokenizer(options.tokenizer_type, options.tokenizer_path)
    specials = special_tokens(tokenizer, options.prepend_bod, options.append_eod)
    inputs = list_inputs(options.inputs)
    total = sum(file.size for file in inputs.files)
    logger.info(
        "%d files, %.1f MB; tokenizer %s (%d ids, sha256 %s...)",
        len(inputs.files), total / 1e6, tokenizer.path, tokenizer.vocab_size, tokenizer.sha256[:12],
    )  # fmt: skip
    if inputs.ignored:
        shown = ", ".join(inputs.ignored[:3])
        logger.warning("%d files are not read because of their names: %s ...", len(inputs.ignored), shown)
    # Small inputs are cut finer, so that every worker gets something; where the cuts lie does not show in the output.
    chunk_bytes = max(min(options.chunk_bytes, total // (4 * options.workers)), min(options.chunk_bytes, 1 << 16))
    chunks = cut_chunks(inputs.files, chunk_bytes)
    choice = choose_engine(options.tokenizer_engine, tokenizer, first_texts(chunks, options.keys))
    logger.info("encoding with %s %s: %s", choice.engine.name, choice.engine.version, choice.reason)
    encoder = DocumentEncoder(tokenizer, specials, choice.engine, options.allow_special_in_text)
    with scratch_directory(options.output_prefix) as scratch, ExitStack() as stack:
        job = Job(encoder, options.keys, str(scratch), options.on_error == "skip")
        writers = {
            key: IndexedWriter(output_prefix(options.output_prefix, key), encoder.dtype, scratch)
            for key in options.keys
        }
        for writer in writers.values():
            stack.callback(writer.close)
        progress = Progress(total, options.log_interval)
        # Closed at once on any error: the workers must be gone before the scratch directory goes.
        with closing(run_chunks(chunks, job, options.workers)) as results:
            account = collect(chunks, results, job, writers, progress)
        account.check(inputs, {key: (writer.documents, writer.tokens) for key, writer in writers.items()})
        for writer in writers.values():
            writer.finish()
        report_path = Path(options.output_prefix + REPORT_SUFFIX)
        report_path.unlink(missing_ok=True)
        for writer in writers.values():
            writer.publish()
        report = make_report(options, tokenizer, choice, inputs, account, progress)
        write_json(report_path, report)
    logger.info("done: %s", progress.line(account))
    for writer in writers.values():
        logger.info("wrote %s and .idx: %d documents, %d tokens", writer.bin_path, writer.documents, writer.tokens)
    _log_left_out(account, report_path)
    return report


def first_texts(chunks: Sequence[Chunk], keys: Sequence[str]) -> list[str]:
    """Texts from the beginning of the corpus, on which the engine of encoding is proved. Bad lines are passed over."""
    texts: list[str] = []
    lines = itertools.chain.from_iterable(read_lines(chunk, LineCounts()) for chunk in chunks)
    for line in itertools.islice(lines, PROOF_LINES):
        try:
            texts.extend(text[:PROOF_CHARACTERS] for text in parse_record(line, keys))
        except BadRecord:
            continue  # the workers will come to it, with its place in the file
        if sum(map(len, texts)) >= PROOF_CHARACTERS:
            break
    return texts


def collect(
    chunks: Sequence[Chunk],
    results: Iterator[ChunkResult],
    job: Job,
    writers: Mapping[str, IndexedWriter],
    progress: Progress,
) -> Account:
    """Append the part files to the writers in the order of the chunks, whatever the order in which workers end.

    Raises `DataError` at the first bad line of the corpus, which therefore does not depend on the number of workers.
    """
    account = Account(job.keys)
    early: dict[int, ChunkResult] = {}
    expected = 0
    for result in results:
        early[result.index] = result
        while expected in early:
            account.add(chunks[expected], early.pop(expected))
            for number, key in enumerate(job.keys):
                paths = part_paths(job.scratch, expected, number)
                writers[key].add_part(*paths)
                for path in paths:
                    os.unlink(path)
            progress.update(account, chunks[expected])
            expected += 1
    assert expected == len(chunks) and not early, "every chunk must be collected exactly once"
    return account


@contextmanager
def scratch_directory(prefix: str) -> Iterator[Path]:
    """A hidden directory beside the output, emptied of what a killed run left, locked, and removed at the end.

    Raises `ConfigError` when another run is writing to the same prefix, or the place cannot be written.
    """
    target = Path(prefix)
    path = target.parent / f".{target.name}.preprocess"
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / "lock", "w", encoding="ascii")
    except OSError as error:
        raise ConfigError(f"--output-prefix {prefix}: cannot write in {target.parent}: {error}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"--output-prefix {prefix}: another run is writing there at this moment.") from error
        except OSError as error:  # a file system without locks: go on without this protection
            logger.warning("%s cannot be locked (%s): make sure that no other run uses this prefix", path, error)
        for left in path.iterdir():
            if left.name != "lock":
                left.unlink()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def make_report(
    options: Options,
    tokenizer: Tokenizer,
    choice: EngineChoice,
    inputs: InputFiles,
    account: Account,
    progress: Progress,
) -> dict[str, Any]:
    """Everything needed to know what is in the output: counts, inputs in order, tokenizer, flags, versions."""
    dtype = token_dtype(tokenizer.vocab_size)
    report = account.as_dict()
    for key, counts in report["keys"].items():
        counts["output"] = output_prefix(options.output_prefix, key)
        counts["dtype"] = dtype.name
        counts["bin_bytes"] = counts["tokens"] * dtype.itemsize
    return {
        **report,
        "seconds": round(progress.elapsed(), 3),
        "workers": options.workers,
        "append_eod": options.append_eod,
        "prepend_bod": options.prepend_bod,
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
            {"path": file.path, "bytes": file.size, "lines": account.lines_per_file.get(index, 0)}
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
        preprocess(parse_flags(argv, environ or {}))
    except (MixtralError, OSError) as error:
        logger.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted: this run leaves nothing under the output's name")
        return 130
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)
    return 0


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
