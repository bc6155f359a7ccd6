"""The account of plain text: every line read is a document, an empty text, a blank line or a counted skip.

`Assembly` adds the chunks up in order and asks `check` before anything gets its final name. `Progress` tells the user
how far the run is.
"""

import logging
import os
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_mixtral.data.account import Account
from megatron_mixtral.data.corpus import Chunk, LineCounts, lines_before
from megatron_mixtral.data.text.workers import ChunkResult, KeyCounts
from megatron_mixtral.errors import DataError

logger = logging.getLogger(__name__)


@dataclass
class FileAccount:
    """One input file: lines so far, and the place in it where the lines read so far begin and end (plain files)."""

    first: Chunk
    last: Chunk
    lines: int = 0
    begin: int = 0
    end: int = 0


@dataclass
class TextAccount(Account):
    """Sums over all chunks so far, `per_key` in the order of the keys; `files` turns a chunk's line numbers into those
    of its file.
    """

    per_key: dict[str, KeyCounts] = field(default_factory=dict)
    files: dict[int, FileAccount] = field(default_factory=dict)

    def add(self, chunk: Chunk, result: ChunkResult) -> None:
        """Take in the next chunk (in order).

        Raises:
            DataError: with `file:line`, when the chunk stopped at a bad line, or when a byte was passed over.
        """
        file = self.files.setdefault(chunk.file_index, FileAccount(chunk, chunk))
        # A shard may begin inside a file; only a bad line needs to know after how many lines.
        before = file.lines + (lines_before(file.first) if result.bad.shown else 0)
        self.add_bad(result.bad, lambda line: f"{chunk.file.path}:{before + line}")
        self._add_place(file, chunk, result.counts)
        self.lines.add(result.counts)
        for total, found in zip(self.per_key.values(), result.keys, strict=True):
            for name, value in asdict(found).items():
                setattr(total, name, getattr(total, name) + value)

    def _add_place(self, file: FileAccount, chunk: Chunk, counts: LineCounts) -> None:
        file.last = chunk
        file.lines += counts.lines
        if counts.begin == counts.end:
            return
        if file.end and counts.begin != file.end:
            raise DataError(
                f"{chunk.file.path}: lines up to byte {file.end} were read, the next begins at {counts.begin}. Did the "
                f"file change? Nothing is written."
            )
        if not file.end:
            file.begin = counts.begin
        file.end = counts.end

    def lines_of(self, file_index: int) -> int:
        """The lines read of one input file."""
        return self.files[file_index].lines if file_index in self.files else 0

    @property
    def records(self) -> int:
        """Lines that are not blank: the documents that came in."""
        return self.lines.lines - self.lines.blank

    @property
    def tokens(self) -> int:
        """The ids of all keys."""
        return sum(counts.tokens for counts in self.per_key.values())

    def check(self, written: dict[str, tuple[int, int]]) -> None:
        """Raises `DataError` unless the counts add up.

        `written` gives, for each key, the documents and tokens that the writer holds. Checked: every byte of every
        plain file was read as part of a line; no file has another size or time than when it was listed; records =
        documents + empty + skipped for each key; the writer agrees.
        """
        for file in self.files.values():
            listed = file.first.file
            status = os.stat(listed.path)
            if (status.st_size, status.st_mtime_ns) != (listed.size, listed.mtime_ns):
                raise DataError(f"{listed.path} has changed while it was read. Nothing is written.")
            if not listed.is_plain:
                continue
            begins = file.begin == 0 if file.first.start == 0 else file.begin >= file.first.start or not file.end
            ends = file.end == listed.size if file.last.end == listed.size and file.first.start == 0 else \
                file.end >= file.last.end or not file.end
            if not begins or not ends:
                raise DataError(
                    f"{listed.path}: bytes {file.begin} to {file.end} were read of {file.first.start} to "
                    f"{file.last.end}. Nothing is written."
                )
        skipped = self.skipped.total()
        for key, found in self.per_key.items():
            if self.records != found.documents + found.empty + skipped:
                raise DataError(
                    f"The counts of key {key!r} do not add up: {self.records} records, but {found.documents} "
                    f"documents + {found.empty} empty + {skipped} skipped. Nothing is written."
                )
            if written[key] != (found.documents, found.tokens):
                raise DataError(
                    f"The counts of key {key!r} do not add up: {found.documents} documents and {found.tokens} tokens "
                    f"were encoded, {written[key][0]} and {written[key][1]} collected. Nothing is written."
                )

    def as_dict(self) -> dict[str, Any]:
        """The counts in the words of the report."""
        keys = {key: asdict(counts) for key, counts in self.per_key.items()}
        return {**super().as_dict(), "records": self.records, "keys": keys}


class Progress:
    """A log line whenever `interval` more records are done, at most one a second.

    What an earlier run had finished counts as done, but not in the rates.
    """

    def __init__(self, total_bytes: int, interval: int) -> None:
        self._total, self._interval = total_bytes, interval
        self.started = self._last_time = time.monotonic()
        self._bytes = self._last_records = 0
        self._before = (0, 0, 0)  # documents, bytes and tokens of an earlier run

    def resume(self, account: TextAccount, done_bytes: int) -> None:
        """Begin the rates here: `account` and `done_bytes` are the work of an earlier run."""
        self._bytes, self._before = done_bytes, (account.records, done_bytes, account.tokens)

    def update(self, account: TextAccount, chunk: Chunk) -> None:
        self._bytes += chunk.size
        now = time.monotonic()
        if account.records - self._last_records < self._interval or now - self._last_time < 1.0:
            return
        self._last_records, self._last_time = account.records, now
        left = (self._total - self._bytes) * (now - self.started) / max(self._bytes - self._before[1], 1)
        logger.info("%s, %d:%02d left", self.line(account), *divmod(round(left), 60))

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def line(self, account: TextAccount) -> str:
        """Documents, bytes and tokens so far, with their rates."""
        seconds = max(self.elapsed(), 1e-9)
        done = (account.records, self._bytes, account.tokens)
        documents, size, tokens = ((now - before) / seconds for now, before in zip(done, self._before, strict=True))
        return (
            f"{account.records:,} documents ({documents:,.0f}/s), "
            f"{self._bytes / 1e6:,.1f} of {self._total / 1e6:,.1f} MB ({size / 1e6:,.2f} MB/s), "
            f"{account.tokens:,} tokens ({tokens:,.0f}/s)"
        )
