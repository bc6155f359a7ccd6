"""Several indexed datasets to one, without reading an id.

The order is the one given, or natural order of the names; so the shards of `--num-shards` give the bytes of the run
without shards. What was written with different tokenizers or flags is refused as far as the reports beside the datasets
tell.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np

from megatron_mixtral.data.corpus import natural_key
from megatron_mixtral.data.indexed.reader import IndexFile, bare_prefix
from megatron_mixtral.data.indexed.writer import IndexedWriter
from megatron_mixtral.data.report import find_report, publish
from megatron_mixtral.data.scratch import scratch_directory
from megatron_mixtral.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

BLOCK = 1 << 20  # sequences at a time
AGREEING = ("append_eod", "prepend_bod")


def merge(prefixes: Sequence[str], output: str, natural_order: bool = True) -> dict[str, Any]:
    """Write the documents of all `prefixes`, one dataset after another, as `output`; returns the new report.

    Raises:
        ConfigError: fewer than two datasets, one given twice, or the output among them.
        DataError: datasets that are damaged, of different dtypes, by other tokenizers or flags, or not all shards.
    """
    prefixes = [bare_prefix(prefix) for prefix in prefixes]
    if natural_order:
        prefixes.sort(key=natural_key)
    if len(prefixes) < 2 or len({os.path.realpath(prefix) for prefix in [*prefixes, output]}) <= len(prefixes):
        raise ConfigError("Give at least two different datasets, and an --output-prefix that is none of them.")
    datasets = [IndexFile(prefix) for prefix in prefixes]
    reports = [find_report(prefix) for prefix in prefixes]
    for dataset in datasets[1:]:
        if dataset.dtype != datasets[0].dtype:
            raise DataError(
                f"{datasets[0].prefix} holds {datasets[0].dtype.name} and {dataset.prefix} {dataset.dtype.name}: they "
                f"were written for vocabularies of different sizes."
            )
    common = _check_reports(prefixes, reports)
    needed = sum(os.path.getsize(f"{prefix}{end}") for prefix in prefixes for end in (".bin", ".idx"))
    with scratch_directory(output, needed, anew=True) as scratch, closing(
        IndexedWriter(output, datasets[0].dtype, scratch, splits=True)
    ) as writer:
        for dataset in datasets:
            _append(writer, dataset)
            logger.info("%s: %d documents, %d tokens", dataset.prefix, len(dataset.documents) - 1, dataset.tokens)
        writer.finish()
        report = {
            "documents": writer.documents,
            "sequences": writer.sequences,
            "tokens": writer.tokens,
            "dtype": writer.dtype.name,
            **common,
            "merged": [
                {"prefix": prefix, "documents": len(dataset.documents) - 1, "tokens": dataset.tokens}
                for prefix, dataset in zip(prefixes, datasets, strict=True)
            ],
        }
        publish([writer], output, report)
    return report


def _append(writer: IndexedWriter, dataset: IndexFile) -> None:
    """Copy one dataset. Its index is read in blocks that end with a document."""
    writer.add_ids(dataset.prefix + ".bin", dataset.tokens)
    firsts = dataset.documents
    if len(firsts) < 1 or firsts[0] != 0 or firsts[-1] != len(dataset.lengths):
        raise DataError(f"{dataset.prefix}.idx: its documents do not cover its {len(dataset.lengths)} sequences.")
    for start in range(0, len(firsts) - 1, BLOCK):
        some = firsts[start : start + BLOCK + 1]
        splits = np.diff(some)
        if splits.size and int(splits.min()) < 0:
            raise DataError(f"{dataset.prefix}.idx: the first sequences of its documents decrease.")
        lengths = np.asarray(dataset.lengths[int(some[0]) : int(some[-1])], dtype=np.int32)
        writer.add_lengths(lengths, splits.astype(np.int32))


def _check_reports(prefixes: Sequence[str], reports: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """What all reports agree on. Raises `DataError` where they do not, or where shards are missing."""
    pairs = zip(prefixes, reports, strict=True)
    known = [(prefix, report) for prefix, report in pairs if report is not None and report.get("tokenizer")]
    if len(known) < len(prefixes):
        logger.warning(
            "%d of %d datasets have no report beside them: their tokenizers cannot be compared",
            len(prefixes) - len(known), len(prefixes),
        )  # fmt: skip
    if not known:
        return {}
    first_prefix, first = known[0]
    for prefix, report in known[1:]:
        ours, theirs = first["tokenizer"]["sha256"], report["tokenizer"]["sha256"]
        if ours != theirs:
            raise DataError(
                f"{first_prefix} and {prefix} were written with different tokenizers (sha256 {ours[:12]}... and "
                f"{theirs[:12]}...)."
            )
        for flag in AGREEING:
            if first.get(flag) != report.get(flag):
                raise DataError(
                    f"{first_prefix} has {flag} {first.get(flag)}, {prefix} has {report.get(flag)}: their documents "
                    f"are framed differently."
                )
    _check_shards(known)
    return {"tokenizer": first["tokenizer"], **{flag: first.get(flag) for flag in AGREEING}}


def _check_shards(known: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Shards must be all there, and in order. Datasets that are no shards may stand beside them."""
    shards = [(prefix, report["shard"]) for prefix, report in known if report.get("shard")]
    by_set: dict[tuple[str, int], list[int]] = {}
    for prefix, shard in shards:
        name = prefix.replace(f"-{shard['index']:05d}-of-{shard['count']:05d}", "")
        by_set.setdefault((name, shard["count"]), []).append(shard["index"])
    for (name, count), found in by_set.items():
        if found != list(range(count)):
            missing = sorted(set(range(count)) - set(found))
            what = f"{missing} are missing" if missing else f"they come in the order {found}"
            raise DataError(f"The shards of {name} must be 0 to {count - 1}, in this order: {what}.")
