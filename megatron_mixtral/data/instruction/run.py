"""Instruction data to the three datasets that fine-tuning reads.

    inputs -> records -> samples (rendering, in worker processes) -> packs (packing) -> {prefix}_packed_*

`{prefix}_packed_input_ids_document`, `..._attention_mask_document` and `..._labels_document` (each `.bin/.idx`, int32)
hold the same sequences, one per sample: its ids, ones, and its ids with -100 where they are not trained. Without
packing a document is one sample; with packing it is one pack, so the bounds of its sequences are those of the samples.

A sample of n ids has n - 1 *positions* in training (each id predicts the next). It fits `--seq-length` S when
n - 1 <= S, and a pack holds samples of together at most S positions.
"""

import itertools
import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mixtral.data.corpus import list_inputs, read_objects
from megatron_mixtral.data.indexed import IndexedWriter
from megatron_mixtral.data.instruction.options import InstructionOptions
from megatron_mixtral.data.instruction.packing import best_fit
from megatron_mixtral.data.instruction.rendering import Batch, InstructionAccount, Renderer
from megatron_mixtral.data.processes import run_in_order
from megatron_mixtral.data.report import REPORT_SUFFIX, publish, tokenizer_facts, versions
from megatron_mixtral.data.scratch import scratch_directory
from megatron_mixtral.errors import DataError
from megatron_mixtral.tokenizer import chat, load_tokenizer

logger = logging.getLogger(__name__)

COLUMNS = ("input_ids", "attention_mask", "labels")
ROWS_PER_WRITE = 1024
RECORDS_PER_BATCH = 256
BATCHES_PER_WORKER = 4  # read ahead of the oldest that is not done


def column_prefix(prefix: str, column: str) -> str:
    """Where one of `COLUMNS` goes; ModelLink's names, which also say `packed` where a document is one sample."""
    return f"{prefix}_packed_{column}_document"


def preprocess_instructions(options: InstructionOptions) -> dict[str, Any]:
    """Render `options.inputs`; returns the report, which also lies in `reports/` beside the data sets.

    Raises:
        ConfigError: flags, paths or a tokenizer that cannot work.
        DataError: a record that fits no form (with its place) unless such records are skipped, no sample at all, or a
            worker that died. No output is left then; an older output of the same name is kept.
    """
    tokenizer = load_tokenizer(options.tokenizer_type, options.tokenizer_path)
    renderer = Renderer(options, tokenizer)
    inputs = list_inputs(options.inputs)
    logger.info("%d files; handler %s, template %s, tokenizer %s", len(inputs.files), options.handler,
                options.template_name, tokenizer.path)
    account, prefix = InstructionAccount(), options.output_prefix
    needed = sum(file.size for file in inputs.files) // 4 * 17  # a token: 4 bytes of text, 5 of a sample, 12 of columns
    with scratch_directory(prefix, needed, anew=True) as scratch, closing(_Samples(scratch)) as samples:
        records = itertools.chain.from_iterable(
            read_objects(file, options.chunk_bytes, account.lines) for file in inputs.files)
        batches = itertools.batched(records, RECORDS_PER_BATCH)
        ahead = BATCHES_PER_WORKER * options.workers
        # Closed at once on any error: the workers must be gone before this process is.
        with closing(run_in_order(batches, renderer, options.workers, ahead)) as results:
            _collect(results, samples, account, options.log_interval)
        positions = samples.lengths() - 1
        taken = -(-positions // options.pad_to_multiple_of) * options.pad_to_multiple_of
        rows = best_fit(taken, options.seq_length) if options.pack else [[n] for n in range(positions.size)]
        filled = float(positions.sum()) / (len(rows) * options.seq_length) if options.seq_length else None
        counts = {"documents": len(rows), "sequences": positions.size, "tokens": account.counts.tokens}
        report = {
            **account.as_dict(),
            "handler": options.handler,
            "prompt_type": options.template_name,
            "append_eod": options.append_eod,
            "on_error": options.on_error,
            "seq_length": options.seq_length,
            "packed": options.pack,
            "pad_to_multiple_of": options.pad_to_multiple_of,
            "rows": len(rows),
            "filled": filled,
            "keys": {column: {"output": column_prefix(prefix, column), "dtype": "int32", **counts}
                     for column in COLUMNS},
            "tokenizer": tokenizer_facts(tokenizer),
            "inputs": [{"path": file.path, "bytes": file.size} for file in inputs.files],
            "ignored_files": list(inputs.ignored),
            "versions": versions(),
        }
        _write(samples, rows, scratch, report, prefix)
    _log_result(options, account, report)
    return report


def _collect(results: Iterator[Batch], samples: "_Samples", account: InstructionAccount, log_interval: int) -> None:
    """All batches to `samples` and `account`. `DataError` where the account does not add up, or no sample came out."""
    counts, logged = account.counts, 0
    for batch in results:
        samples.add(batch)
        account.add(batch)
        if counts.records // log_interval > logged:
            logged = counts.records // log_interval
            logger.info("%d records, %d samples, %d tokens", counts.records, counts.samples, counts.tokens)
    if counts.records != counts.samples + counts.too_long + account.skipped.total():
        raise DataError(f"The counts do not add up: {account}. Nothing is written.")
    if counts.samples == 0:
        raise DataError(f"No sample came out of {counts.records} records: {account.left_out() or 'no record'}. "
                        "Nothing is written.")


class _Samples:
    """Samples in two raw files, ids (int32) and mask (bool), so that memory holds only their lengths."""

    def __init__(self, scratch: Path) -> None:
        self._paths = scratch / "samples.ids", scratch / "samples.trained"
        self._files = [open(path, "wb") for path in self._paths]
        self._lengths: list[np.ndarray] = []

    def add(self, batch: Batch) -> None:
        for file, values in zip(self._files, (batch.ids, batch.trained), strict=True):
            file.write(values.tobytes())
        self._lengths.append(batch.lengths)

    def lengths(self) -> np.ndarray:
        """int64 (samples,), in ids. Nothing can be added afterwards."""
        self.close()
        self._sizes = np.concatenate(self._lengths)
        self._ends = np.cumsum(self._sizes)
        self._ids, self._trained = (np.memmap(path, dtype=kind, mode="r")
                                    for path, kind in zip(self._paths, (np.int32, bool), strict=True))
        return self._sizes

    def take(self, samples: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, trained) of these samples, one after another, and the length of each (int32); after `lengths`."""
        spans = [slice(int(self._ends[n] - self._sizes[n]), int(self._ends[n])) for n in samples]
        ids, trained = (np.concatenate([values[span] for span in spans]) for values in (self._ids, self._trained))
        return ids, trained, self._sizes[samples].astype(np.int32)

    def close(self) -> None:
        for file in self._files:
            file.close()


def _write(
    samples: _Samples, rows: list[list[int]], scratch: Path, report: dict[str, Any], prefix: str
) -> None:
    """The three datasets; under their final names only when all three are whole."""
    writers = [IndexedWriter(column_prefix(prefix, column), np.dtype(np.int32), scratch, splits=True)
               for column in COLUMNS]
    try:
        for start in range(0, len(rows), ROWS_PER_WRITE):
            block = rows[start : start + ROWS_PER_WRITE]
            ids, trained, lengths = samples.take([sample for row in block for sample in row])
            labels = np.where(trained, ids, np.int32(chat.IGNORED))
            sizes = np.array([len(row) for row in block], dtype=np.int32)
            for writer, values in zip(writers, (ids, np.ones_like(ids), labels), strict=True):
                writer.add(values, lengths, sizes)
        for writer in writers:
            writer.finish()
        publish(writers, prefix, report)
    finally:
        for writer in writers:
            writer.close()


def _log_result(options: InstructionOptions, account: InstructionAccount, report: dict[str, Any]) -> None:
    counts = account.counts
    if options.handler == "auto":
        found = ", ".join(f"{number} of {name}" for name, number in counts.formats.most_common())
        logger.warning("--handler-name auto read the records by their content as: %s", found)
    logger.info("%d records -> %d samples in %d rows: %d tokens, %d of them trained; the longest sample has %d",
                counts.records, counts.samples, report["rows"], counts.tokens, counts.trained_tokens,
                counts.longest_sample)
    if report["filled"] is not None:
        logger.info("rows of --seq-length %d are filled to %.1f %%", options.seq_length, 100 * report["filled"])
    if left_out := account.left_out():
        logger.warning("left out: %s; see %s", left_out, options.output_prefix + REPORT_SUFFIX)
    logger.info("wrote %s and the other two, .bin and .idx", column_prefix(options.output_prefix, COLUMNS[0]))
