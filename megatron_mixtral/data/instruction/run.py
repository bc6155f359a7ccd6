"""Instruction data to the three datasets that fine-tuning reads.

    inputs -> records -> samples (rendering, in worker processes) -> packs (packing) -> {prefix}_packed_*

`{prefix}_packed_input_ids_document`, `..._attention_mask_document` and `..._labels_document` (each `.bin/.idx`, int32)
hold the same sequences, one per sample: its ids, ones, and its ids with -100 where they are not trained. Without
packing a document is one sample; with packing it is one pack, so the bounds of its sequences are those of the samples.

A sample of n ids has n - 1 *positions* in training (each id predicts the next). It fits `--seq-length` S when
n - 1 <= S, and a pack holds samples of together at most S positions.

`data/preprocess/run.py` calls `preprocess_instructions` when `--handler-name` is given.
"""

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mixtral.data.cli import Options
from megatron_mixtral.data.corpus.files import REPORT_SUFFIX, list_inputs
from megatron_mixtral.data.indexed.writer import IndexedWriter
from megatron_mixtral.data.instruction.packing import best_fit
from megatron_mixtral.data.instruction.records import Lines, read_file
from megatron_mixtral.data.instruction.rendering import Batch, Counts, Renderer, render_records
from megatron_mixtral.data.preprocess.parts import clear
from megatron_mixtral.data.preprocess.report import versions, write_json
from megatron_mixtral.data.preprocess.scratch import scratch_directory
from megatron_mixtral.errors import DataError
from megatron_mixtral.tokenizer.chat import IGNORED
from megatron_mixtral.tokenizer.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

COLUMNS = ("input_ids", "attention_mask", "labels")
ROWS_PER_WRITE = 1024


def column_prefix(prefix: str, column: str) -> str:
    """Where one of `COLUMNS` goes; ModelLink's names, which also say `packed` where a document is one sample."""
    return f"{prefix}_packed_{column}_document"


def preprocess_instructions(options: Options) -> dict[str, Any]:
    """Render `options.inputs`; returns the report, which also lies in `{prefix}.report.json`.

    Raises:
        ConfigError: flags, paths or a tokenizer that cannot work.
        DataError: a record that fits no form (with its place) unless such records are skipped, or no sample at all. No
            output is left then; an older output of the same name is kept.
    """
    tokenizer = load_tokenizer(options.tokenizer_type, options.tokenizer_path)
    renderer = Renderer(options, tokenizer)
    inputs = list_inputs(options.inputs)
    for path in inputs.ignored:
        logger.warning("not read because of its name: %s", path)
    logger.info("%d files; handler %s, template %s, tokenizer %s", len(inputs.files), options.handler,
                options.prompt_type, tokenizer.path)
    counts, lines, logged = Counts(), Lines(), 0
    with _emptied_scratch(options.output_prefix) as scratch, closing(_Samples(scratch)) as samples:
        records = (found for file in inputs.files for found in read_file(file, options.chunk_bytes, lines))
        # Closed at once on any error: the workers must be gone before this process is.
        with closing(render_records(records, renderer, options.workers)) as batches:
            for batch in batches:
                samples.add(batch)
                counts.add(batch.counts)
                if counts.records // options.log_interval > logged:
                    logged = counts.records // options.log_interval
                    logger.info("%d records, %d samples, %d tokens", counts.records, counts.samples, counts.tokens)
        if counts.records != counts.samples + counts.too_long + counts.skipped.total():
            raise DataError(f"The counts do not add up: {counts}. Nothing is written.")
        if counts.samples == 0:
            raise DataError(f"No sample came out of {counts.records} records: {_left_out(counts) or 'no record'}. "
                            "Nothing is written.")
        positions = samples.lengths() - 1
        rows = best_fit(positions, options.seq_length) if options.pack else [[n] for n in range(counts.samples)]
        _write(options.output_prefix, samples, rows, scratch)
        report = _report(options, tokenizer, counts, lines, [file.path for file in inputs.files], rows, positions)
        write_json(Path(options.output_prefix + REPORT_SUFFIX), report)
    _log_result(options, counts, report)
    return report


@contextmanager
def _emptied_scratch(prefix: str) -> Iterator[Path]:
    """The scratch directory of a run that begins anew each time, whatever ended the last one."""
    with scratch_directory(prefix) as scratch:
        clear(scratch)
        try:
            yield scratch
        except BaseException:
            clear(scratch)
            raise


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


def _write(prefix: str, samples: _Samples, rows: list[list[int]], scratch: Path) -> None:
    """The three datasets; under their final names only when all three are whole."""
    writers = [IndexedWriter(column_prefix(prefix, column), np.dtype(np.int32), scratch, splits=True)
               for column in COLUMNS]
    try:
        for start in range(0, len(rows), ROWS_PER_WRITE):
            block = rows[start : start + ROWS_PER_WRITE]
            ids, trained, lengths = samples.take([sample for row in block for sample in row])
            labels = np.where(trained, ids, np.int32(IGNORED))
            sizes = np.array([len(row) for row in block], dtype=np.int32)
            for writer, values in zip(writers, (ids, np.ones_like(ids), labels), strict=True):
                writer.add(values, lengths, sizes)
        for writer in writers:
            writer.finish()
        Path(prefix + REPORT_SUFFIX).unlink(missing_ok=True)
        for writer in writers:
            writer.publish()
    finally:
        for writer in writers:
            writer.close()


def _report(options: Options, tokenizer: Tokenizer, counts: Counts, lines: Lines, paths: list[str],
            rows: list[list[int]], positions: np.ndarray) -> dict[str, Any]:
    """Everything needed to know what is in the output."""
    return {
        "handler": options.handler,
        "prompt_type": options.prompt_type,
        "append_eod": options.append_eod,
        "on_error": options.on_error,
        "seq_length": options.seq_length,
        "lines": lines.read,
        "blank_lines": lines.blank,
        "records": counts.records,
        "formats": dict(counts.formats.most_common()),
        "samples": counts.samples,
        "tokens": counts.tokens,
        "trained_tokens": counts.trained_tokens,
        "longest_sample": counts.longest,
        "too_long": counts.too_long,
        "too_long_tokens": counts.too_long_tokens,
        "skipped": dict(sorted(counts.skipped.items())),
        "skipped_records": counts.skipped_records,
        "left_out_of_samples": dict(sorted(counts.left_out.items())),
        "packed": options.pack,
        "rows": len(rows),
        "filled": float(positions.sum()) / (len(rows) * options.seq_length) if options.seq_length else None,
        "outputs": [column_prefix(options.output_prefix, column) for column in COLUMNS],
        "dtype": "int32",
        "tokenizer": {"name": tokenizer.name, "path": str(tokenizer.path), "sha256": tokenizer.sha256,
                      "vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id},
        "inputs": paths,
        "versions": versions(),
    }


def _left_out(counts: Counts) -> str:
    """What is not in the output, in words; empty where all of it is."""
    parts = [f"{number} records skipped: {reason}" for reason, number in sorted(counts.skipped.items())]
    if counts.too_long:
        parts.append(f"{counts.too_long} samples of {counts.too_long_tokens} tokens longer than --seq-length + 1")
    parts += [f"{number} times {what}" for what, number in sorted(counts.left_out.items())]
    return "; ".join(parts)


def _log_result(options: Options, counts: Counts, report: dict[str, Any]) -> None:
    if options.handler == "auto":
        found = ", ".join(f"{number} of {name}" for name, number in counts.formats.most_common())
        logger.warning("--handler-name auto read the records by their content as: %s", found)
    logger.info("%d records -> %d samples in %d rows: %d tokens, %d of them trained; the longest sample has %d",
                counts.records, counts.samples, report["rows"], counts.tokens, counts.trained_tokens, counts.longest)
    if report["filled"] is not None:
        logger.info("rows of --seq-length %d are filled to %.1f %%", options.seq_length, 100 * report["filled"])
    if left_out := _left_out(counts):
        logger.warning("left out: %s; see %s", left_out, options.output_prefix + REPORT_SUFFIX)
    logger.info("wrote %s and the other two, .bin and .idx", report["outputs"][0])
