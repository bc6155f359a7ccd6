"""What an indexed dataset holds, and whether it is whole."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mixtral.data.indexed.reader import IndexFile, bare_prefix
from megatron_mixtral.data.report import find_report
from megatron_mixtral.errors import DataError
from megatron_mixtral.tokenizer import Tokenizer, chat

BLOCK = 1 << 22  # sequences at a time


@dataclass
class Inspection:
    """Counts and quantiles of a dataset, and sentences on what is wrong with it, none if it is whole."""

    prefix: str
    facts: dict[str, Any]
    problems: list[str]

    def __str__(self) -> str:
        width = max(map(len, self.facts))
        lines = [self.prefix, *(f"  {name:<{width}}  {value}" for name, value in self.facts.items())]
        return "\n".join([*lines, *(f"  PROBLEM: {problem}" for problem in self.problems or [])]
                         + ([] if self.problems else ["  whole"]))


def inspect(prefix: str, vocab_size: int | None = None) -> Inspection:
    """Read a whole dataset, in blocks, and check it.

    `vocab_size` is the bound of the ids; without it the report beside the dataset gives it. Raises `DataError` where
    the pair cannot be read at all: another format, or sizes of `.bin` and `.idx` that contradict each other.
    """
    prefix = bare_prefix(prefix)
    index = IndexFile(prefix)
    report = find_report(prefix)
    tokenizer = tokenizer_of(prefix)
    if vocab_size is None and tokenizer:
        vocab_size = tokenizer["vocab_size"]
    problems = [*_index_problems(index), *_report_problems(index, report)]
    smallest, largest, ends = _range_of_ids(index, tokenizer and tokenizer.get("eos_id"))
    least = chat.IGNORED if prefix.endswith("_labels_document") else 0  # of instruction data
    if largest is not None and vocab_size is not None and not least <= smallest <= largest < vocab_size:
        problems.append(f"ids reach from {smallest} to {largest}; the vocabulary has {vocab_size}")
    lengths = index.lengths
    quantiles = [int(x) for x in np.quantile(lengths, (0, 0.1, 0.5, 0.9, 0.99, 1))] if len(lengths) else []
    facts = {
        "documents": len(index.documents) - 1,
        "sequences": len(index),
        "tokens": index.tokens,
        "bytes per id": f"{index.dtype.itemsize} ({index.dtype.name})",
        "tokens per sequence": f"mean {index.tokens / max(len(index), 1):.1f}; least, 10 %, median, 90 %, 99 %, most: "
                               f"{', '.join(map(str, quantiles))}",
        "ids": f"{smallest} to {largest}" if largest is not None else "none",
        "vocabulary": vocab_size if vocab_size is not None else "unknown: no report, and no --tokenizer-model",
    }  # fmt: skip
    if ends is not None:
        facts["sequences that end with EOS"] = ends
    if tokenizer:
        facts["tokenizer"] = f"{tokenizer['path']} (sha256 {tokenizer['sha256'][:12]}...)"
    return Inspection(prefix, facts, problems)


def samples(prefix: str, tokenizer: Tokenizer, count: int) -> Iterator[str]:
    """The beginnings of `count` sequences, evenly spread, as ids and as text."""
    index = IndexFile(bare_prefix(prefix))
    for number in np.unique(np.linspace(0, len(index) - 1, min(count, len(index))).astype(np.int64)).tolist():
        ids = index.sequence(number)
        shown = ids[:64].tolist()
        more = f" ... ({ids.size} tokens)" if ids.size > 64 else ""
        yield f"[{number}] {shown[:12]}{'...' if ids.size > 12 else ''}\n{tokenizer.decode(shown)}{more}"


def _index_problems(index: IndexFile) -> list[str]:
    """Lengths, pointers and document boundaries must follow from one another."""
    problems = []
    position = 0
    for start in range(0, len(index), BLOCK):
        lengths = index.lengths[start : start + BLOCK].astype(np.int64)
        if lengths.min() < 1:
            problems.append(f"sequence {start + int(lengths.argmin())} has {lengths.min()} tokens")
            break
        starts = position + np.concatenate(([0], np.cumsum(lengths)[:-1])) * index.dtype.itemsize
        wrong = np.flatnonzero(starts != index.pointers[start : start + BLOCK])
        if wrong.size:
            at = int(wrong[0])
            problems.append(f"sequence {start + at} should begin at byte {starts[at]}, the index says "
                            f"{index.pointers[start + at]}")  # fmt: skip
            break
        position += int(lengths.sum()) * index.dtype.itemsize
    documents = index.documents
    if not len(documents) or documents[0] != 0 or documents[-1] != len(index):
        problems.append(f"the documents do not cover sequences 0 to {len(index)}")
    elif any(bool((np.diff(documents[at : at + BLOCK + 1]) < 0).any()) for at in range(0, len(documents), BLOCK)):
        problems.append("the first sequences of the documents decrease")
    return problems


def _range_of_ids(index: IndexFile, eos: int | None) -> tuple[int | None, int | None, int | None]:
    """Smallest and largest id, and how many sequences end with EOS."""
    if not index.tokens:
        return None, None, None
    ids = np.memmap(index.prefix + ".bin", dtype=index.dtype, mode="r")
    smallest, largest = int(ids.min()), int(ids.max())
    if eos is None:
        return smallest, largest, None
    lasts = index.pointers // index.dtype.itemsize + index.lengths - 1
    inside = (lasts >= 0) & (lasts < ids.size)
    return smallest, largest, int((ids[lasts[inside]] == eos).sum())


def _report_problems(index: IndexFile, report: dict[str, Any] | None) -> list[str]:
    if report is None:
        return []
    counts = report if "merged" in report else next(
        (one for one in report["keys"].values() if Path(one["output"]).name == Path(index.prefix).name), None
    )
    if counts is None:
        return []
    found = {"documents": len(index.documents) - 1, "tokens": index.tokens}
    return [f"the report says {counts[name]} {name}, found {value}" for name, value in found.items()
            if counts[name] != value]  # fmt: skip


def tokenizer_of(prefix: str) -> dict[str, Any] | None:
    """What the report beside a dataset says of its tokenizer, or None."""
    report = find_report(prefix)
    return report.get("tokenizer") if report else None


def check_tokenizer(prefix: str, tokenizer: Tokenizer) -> None:
    """Raises `DataError` where the report says that the dataset was written with another tokenizer."""
    noted = tokenizer_of(prefix)
    if noted and noted["sha256"] != tokenizer.sha256:
        raise DataError(
            f"{prefix} was written with {noted['path']} (sha256 {noted['sha256'][:12]}...), not with {tokenizer.path} "
            f"(sha256 {tokenizer.sha256[:12]}...)."
        )
