"""What a worker does with plain text: a chunk of input becomes part files and an account of a few numbers.

Ids and lengths never travel between processes: a worker writes them to raw files in the scratch directory, where
`Assembly` picks them up in order.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_mixtral.data.account import BadRecords
from megatron_mixtral.data.corpus import BadRecord, Chunk, LineCounts, read_records
from megatron_mixtral.tokenizer import DocumentEncoder

BATCH_CHARACTERS = 1 << 19  # text held before it is encoded and written


@dataclass
class KeyCounts:
    """One key of one chunk: documents written, empty texts dropped, ids, UTF-8 bytes of the texts.

    `control_documents` and `control_tokens`: see `ControlCounts` of the tokenizer.
    """

    documents: int = 0
    empty: int = 0
    tokens: int = 0
    text_bytes: int = 0
    control_documents: int = 0
    control_tokens: int = 0


@dataclass
class ChunkResult:
    """The account of one chunk. `checksums` are the CRC-32 of the ids, for each key. A bad record's place is its line,
    from 1 within the chunk.
    """

    counts: LineCounts = field(default_factory=LineCounts)
    keys: list[KeyCounts] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    bad: BadRecords = field(default_factory=BadRecords)


def part_paths(scratch: str | Path, chunk: Chunk, key_index: int) -> tuple[Path, Path]:
    """The files of a chunk for one key: ids, and the length of each document."""
    ids, lengths = (Path(scratch, f"{chunk.name}-{key_index}.{end}") for end in ("ids", "lengths"))
    return ids, lengths


@dataclass(frozen=True)
class ChunkEncoder:
    """The work of a run: chunk after chunk, read, encoded and written to `scratch`."""

    encoder: DocumentEncoder
    keys: tuple[str, ...]
    scratch: str
    skip_bad: bool

    def run(self, chunk: Chunk) -> ChunkResult:
        """Read, encode and write one chunk. Memory is bounded by a batch of text and its ids, whatever its size.

        Raises `DataError` when the file cannot be read or the tokenizer misbehaves; a bad line is in the result.
        """
        result = ChunkResult(keys=[KeyCounts() for _ in self.keys])
        parts = [_PartWriter(part_paths(self.scratch, chunk, number), self.encoder, counts)
                 for number, counts in enumerate(result.keys)]  # fmt: skip
        try:
            for found in read_records(chunk, self.keys, result.counts):
                if isinstance(found, BadRecord):
                    result.bad.add(result.counts.lines, found, self.skip_bad)
                    if result.bad.failed:
                        return result
                    continue
                for part, texts in zip(parts, found, strict=True):
                    part.add(texts)
            for part in parts:
                part.write_batch()
        finally:
            for part in parts:
                part.close()
        result.checksums = [part.checksum for part in parts]
        return result

    def place(self, chunk: Chunk) -> str:
        """See `Work.place`."""
        return f"{chunk.start} to {chunk.end} of {chunk.file.path}"


class _PartWriter:
    """Gathers the texts of one key and writes their ids and lengths batch by batch."""

    def __init__(self, paths: tuple[Path, Path], encoder: DocumentEncoder, counts: KeyCounts) -> None:
        self._ids, self._lengths = (open(path, "wb") for path in paths)
        self._encoder, self._counts = encoder, counts
        self._texts: list[str] = []
        self._characters = 0
        self.checksum = 0

    def add(self, texts: Sequence[str]) -> None:
        kept = [text for text in texts if text]
        self._counts.empty += len(texts) - len(kept)
        self._texts += kept
        self._characters += sum(map(len, kept))
        if self._characters >= BATCH_CHARACTERS:
            self.write_batch()

    def write_batch(self) -> None:
        if not self._texts:
            return
        texts, self._texts, self._characters = self._texts, [], 0
        ids, lengths = self._encoder.encode_documents(texts)
        controls = self._encoder.take_control_counts()
        counts = self._counts
        counts.control_documents += controls.documents
        counts.control_tokens += controls.tokens
        # An ASCII text has as many bytes as characters; only others are encoded to be counted.
        counts.text_bytes += sum(map(len, texts))
        counts.text_bytes += sum(len(text.encode("utf-8")) - len(text) for text in texts if not text.isascii())
        kept = lengths[lengths > 0]
        counts.documents += kept.size
        counts.empty += lengths.size - kept.size
        counts.tokens += ids.size
        data = np.ascontiguousarray(ids).data.cast("B") if ids.size else b""
        self.checksum = zlib.crc32(data, self.checksum)
        self._ids.write(data)
        self._lengths.write(kept.astype("<i4").tobytes())

    def close(self) -> None:
        self._ids.close()
        self._lengths.close()
