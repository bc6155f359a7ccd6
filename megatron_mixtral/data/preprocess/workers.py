"""What a worker does: a chunk of input becomes part files and an account of a few numbers.

Ids and lengths never travel between processes: a worker writes them to raw files in the scratch directory, where
`data/preprocess/run.py` picks them up in order. `pool.py` starts the processes.
"""

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_mixtral.data.corpus.files import Chunk
from megatron_mixtral.data.corpus.readers import LineCounts, read_records
from megatron_mixtral.data.corpus.records import BadRecord
from megatron_mixtral.data.preprocess.sentences import SentenceRule, open_splitter
from megatron_mixtral.tokenizer.encode import DocumentEncoder
from megatron_mixtral.tokenizer.engines.base import SpecialTokens

BATCH_CHARACTERS = 1 << 19  # text held before it is encoded and written
BAD_LINES_KEPT = 50  # per chunk, for the report; the counts are always complete


@dataclass(frozen=True)
class Job:
    """What is the same for every chunk of a run.

    `sentences` is None where a document is one sequence, which the encoder frames; else the encoder is to add nothing,
    and `specials` go around the documents.
    """

    encoder: DocumentEncoder
    specials: SpecialTokens
    keys: tuple[str, ...]
    scratch: str
    skip_bad_lines: bool
    sentences: SentenceRule | None = None


@dataclass
class KeyCounts:
    """One key of one chunk: documents written, their sequences, empty texts dropped, ids, UTF-8 bytes of the texts.

    `control_documents` and `control_tokens`: see `encoding.ControlCounts`.
    """

    documents: int = 0
    sequences: int = 0
    empty: int = 0
    tokens: int = 0
    text_bytes: int = 0
    control_documents: int = 0
    control_tokens: int = 0


@dataclass
class BadLine:
    """`line` counts from 1 within the chunk."""

    line: int
    reason: str
    message: str


@dataclass
class ChunkResult:
    """The account of one chunk. `checksums` are the CRC-32 of the ids, for each key. `failed`: reading stopped at the
    (only) bad line, since bad lines are not skipped.
    """

    counts: LineCounts = field(default_factory=LineCounts)
    keys: list[KeyCounts] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    failed: bool = False


@dataclass(frozen=True)
class PartPaths:
    """The files of a chunk for one key: ids, length of each sequence, and number of sequences of each document.

    The last exists only where documents are split into sentences.
    """

    ids: str
    lengths: str
    splits: str

    @classmethod
    def of(cls, scratch: str, chunk_name: str, key_index: int) -> "PartPaths":
        stem = os.path.join(scratch, f"{chunk_name}-{key_index}")
        return cls(stem + ".ids", stem + ".lengths", stem + ".splits")


class ChunkEncoder:
    """Encodes chunk after chunk of one run."""

    def __init__(self, job: Job) -> None:
        """Raises `ConfigError` when the sentence splitter cannot be opened."""
        self.job = job
        self._split = open_splitter(job.sentences) if job.sentences else None

    def encode(self, chunk: Chunk) -> ChunkResult:
        """Read, encode and write one chunk. Memory is bounded by a batch of text and its ids, whatever its size.

        Raises `DataError` when the file cannot be read or the tokenizer misbehaves; a bad line is in the result.
        """
        job = self.job
        result = ChunkResult(keys=[KeyCounts() for _ in job.keys])
        parts = [self._part(PartPaths.of(job.scratch, chunk.name, n), counts) for n, counts in enumerate(result.keys)]
        try:
            for found in read_records(chunk, job.keys, result.counts):
                if isinstance(found, BadRecord):
                    skipped = result.counts.skipped
                    skipped[found.reason] = skipped.get(found.reason, 0) + 1
                    if len(result.bad) < BAD_LINES_KEPT:
                        result.bad.append(BadLine(result.counts.lines, found.reason, str(found)))
                    if not job.skip_bad_lines:
                        result.failed = True
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

    def _part(self, paths: PartPaths, counts: KeyCounts) -> "_PartWriter":
        if self._split is None:
            return _PartWriter(paths, self.job.encoder, counts)
        return _SentencePartWriter(paths, self.job.encoder, counts, self._split, self.job.specials)


class _PartWriter:
    """Gathers the texts of one key and writes their ids and lengths batch by batch."""

    def __init__(self, paths: PartPaths, encoder: DocumentEncoder, counts: KeyCounts) -> None:
        self._ids, self._lengths = open(paths.ids, "wb", buffering=0), open(paths.lengths, "wb", buffering=0)
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
        ids, lengths = self._encode(texts, texts)
        kept = lengths[lengths > 0]
        self._counts.documents += kept.size
        self._counts.empty += lengths.size - kept.size
        self._write(ids, kept)

    def _encode(self, documents: list[str], pieces: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids and lengths of all pieces of the documents."""
        ids, lengths = self._encoder.encode_documents(pieces)
        controls = self._encoder.take_control_counts()
        self._counts.control_documents += controls.documents
        self._counts.control_tokens += controls.tokens
        # An ASCII text has as many bytes as characters; only others are encoded to be counted.
        self._counts.text_bytes += sum(map(len, documents))
        self._counts.text_bytes += sum(len(t.encode("utf-8")) - len(t) for t in documents if not t.isascii())
        return ids, lengths

    def _write(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        self._counts.sequences += lengths.size
        self._counts.tokens += ids.size
        data = np.ascontiguousarray(ids).data.cast("B") if ids.size else b""
        self.checksum = zlib.crc32(data, self.checksum)
        _write_all(self._ids, data)
        _write_all(self._lengths, lengths.astype("<i4").tobytes())

    def close(self) -> None:
        self._ids.close()
        self._lengths.close()


class _SentencePartWriter(_PartWriter):
    """The same for documents of several sentences, each a sequence. Sentences without ids are dropped."""

    def __init__(
        self, paths: PartPaths, encoder: DocumentEncoder, counts: KeyCounts, split: Callable[[str], list[str]],
        specials: SpecialTokens,
    ) -> None:  # fmt: skip
        super().__init__(paths, encoder, counts)
        self._splits = open(paths.splits, "wb", buffering=0)
        self._split, self._specials = split, specials

    def write_batch(self) -> None:
        if not self._texts:
            return
        texts, self._texts, self._characters = self._texts, [], 0
        sentences = [self._split(text) for text in texts]
        ids, lengths = self._encode(texts, [one for of_document in sentences for one in of_document])
        document_of = np.repeat(np.arange(len(texts)), [len(of_document) for of_document in sentences])[lengths > 0]
        ids, lengths = frame_documents(ids, lengths[lengths > 0], document_of, self._specials)
        splits = np.bincount(document_of, minlength=len(texts))
        splits = splits[splits > 0]
        self._counts.documents += splits.size
        self._counts.empty += len(texts) - splits.size
        self._write(ids, lengths)
        _write_all(self._splits, splits.astype("<i4").tobytes())

    def close(self) -> None:
        super().close()
        self._splits.close()


def frame_documents(
    ids: np.ndarray, lengths: np.ndarray, document_of: np.ndarray, specials: SpecialTokens
) -> tuple[np.ndarray, np.ndarray]:
    """BOS before the first sequence of each document and EOS after its last: new (ids, lengths).

    `lengths` (sequences,), none of them 0, and `document_of` (sequences,), not decreasing, belong together.
    """
    changes = np.flatnonzero(np.diff(document_of))
    firsts = np.concatenate(([0], changes + 1)) if document_of.size else changes
    lasts = np.concatenate((changes, [document_of.size - 1])) if document_of.size else changes
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    lengths = lengths.copy()
    places, values = [], []
    if specials.eos_id is not None:
        places.append(ends[lasts])
        values.append(np.full(lasts.size, specials.eos_id))
        lengths[lasts] += 1
    if specials.bos_id is not None:
        places.append(starts[firsts])
        values.append(np.full(firsts.size, specials.bos_id))
        lengths[firsts] += 1
    if places:  # of two values at one place the EOS, given first, stays first
        ids = np.insert(ids, np.concatenate(places), np.concatenate(values).astype(ids.dtype))
    return ids, lengths


def _write_all(stream, data: bytes | memoryview) -> None:
    """Write all of it; an unbuffered file may take less at a time."""
    left = memoryview(data)
    while left:
        left = left[stream.write(left) :]
