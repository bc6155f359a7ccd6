"""Part files, in the order of their chunks, to whole datasets; and what an earlier run had finished of them.

A run opens one `Assembly`, lets workers encode what is `unfinished`, and hands the results to `collect`. A finished
part is appended to the dataset and removed as soon as everything before it is there, so the disk holds the output once.
What a killed run had appended is recognized by the checksums of its parts.
"""

import logging
from collections.abc import Iterable, Sequence

from megatron_mixtral.data.corpus import Chunk
from megatron_mixtral.data.indexed import IndexedWriter, PartSize, whole_parts
from megatron_mixtral.data.text.account import Progress, TextAccount
from megatron_mixtral.data.text.parts import FinishedParts
from megatron_mixtral.data.text.workers import ChunkEncoder, ChunkResult, KeyCounts, part_paths

logger = logging.getLogger(__name__)


def output_prefix(prefix: str, key: str) -> str:
    """Where the documents of one key go, without `.bin` and `.idx`; names as Megatron-LM's tool gives them."""
    return f"{prefix}_{key}_document"


class Assembly:
    """The datasets of one run, one for each key, as they grow.

    Attributes: `unfinished` are the chunks that workers must encode, `pieces` the number of all chunks, `taken_up` the
    number of those that an earlier run had finished, `account` the counts of all that is assembled, `writers` the data
    sets.
    """

    def __init__(
        self, chunks: Sequence[Chunk], work: ChunkEncoder, prefix: str, parts: FinishedParts, progress: Progress
    ) -> None:  # fmt: skip
        self._chunks, self._work, self._parts, self._progress = chunks, work, parts, progress
        self._dtype = work.encoder.dtype
        self.account = TextAccount(per_key={key: KeyCounts() for key in work.keys})
        self._prefixes = [output_prefix(prefix, key) for key in work.keys]
        results = parts.results
        for chunk in chunks:
            if chunk.name in results and results[chunk.name].bad.shown and not work.skip_bad:
                del results[chunk.name]  # finished under --on-error skip; now its bad line must stop the run
        kept = self._whole_parts()
        self.writers = [
            IndexedWriter(prefix, self._dtype, work.scratch, kept=self._sizes(number, kept))
            for number, prefix in enumerate(self._prefixes)
        ]
        for chunk in chunks[kept:]:
            if chunk.name in results and not parts.is_whole(chunk, self._dtype.itemsize):
                del results[chunk.name]
        self.unfinished = [chunk for chunk in chunks if chunk.name not in results]
        self.pieces, self.taken_up = len(chunks), len(chunks) - len(self.unfinished)
        self._assembled = 0
        if results:
            self._log_resumption()
        for chunk in chunks[:kept]:
            self.account.add(chunk, results[chunk.name])
            self._assembled += 1
            self._remove(chunk)
        self._append_finished()
        progress.resume(self.account, sum(chunk.size for chunk in chunks[: self._assembled]))

    def collect(self, results: Iterable[tuple[int, ChunkResult]]) -> None:
        """Append the parts in the order of the chunks, whatever the order in which workers end. `results` have the
        numbers of `unfinished`.

        Raises `DataError` at the first bad line of the corpus, which therefore does not depend on the number of
        workers.
        """
        failed: dict[str, ChunkResult] = {}
        for number, result in results:
            chunk = self.unfinished[number]
            if result.bad.failed:
                failed[chunk.name] = result
            else:
                self._parts.add(chunk, result)
            self._append_finished()
            if failed and (first := self._chunks[self._assembled]).name in failed:
                self.account.add(first, failed[first.name])
        assert self._assembled == len(self._chunks), "every chunk must be collected exactly once"

    def finish(self, may_be_empty: bool) -> None:
        """Check the counts and write the indexes. Raises `DataError` where something does not add up."""
        self.account.check({
            key: (writer.documents, writer.tokens) for key, writer in zip(self._work.keys, self.writers, strict=True)
        })
        for writer in self.writers:
            writer.finish(may_be_empty)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()

    def _append_finished(self) -> None:
        results = self._parts.results
        while self._assembled < len(self._chunks) and (chunk := self._chunks[self._assembled]).name in results:
            self.account.add(chunk, results[chunk.name])
            for number, writer in enumerate(self.writers):
                writer.add_part(*part_paths(self._work.scratch, chunk, number))
            # The next run must find the part here or there, so it goes when the writer's buffer is with the system.
            for writer in self.writers:
                writer.flush()
            self._remove(chunk)
            self._assembled += 1
            self._progress.update(self.account, chunk)

    def _remove(self, chunk: Chunk) -> None:
        for number in range(len(self.writers)):
            for path in part_paths(self._work.scratch, chunk, number):
                path.unlink(missing_ok=True)

    def _sizes(self, key_number: int, count: int) -> list[PartSize]:
        """What the first `count` chunks add to the dataset of one key."""
        results = [self._parts.results[chunk.name] for chunk in self._chunks[:count]]
        return [
            PartSize(result.keys[key_number].tokens, result.keys[key_number].documents, result.checksums[key_number])
            for result in results
        ]

    def _whole_parts(self) -> int:
        """How many of the first chunks an earlier run has appended to every dataset."""
        unfinished = (number for number, chunk in enumerate(self._chunks) if chunk.name not in self._parts.results)
        finished = next(unfinished, len(self._chunks))
        for number, prefix in enumerate(self._prefixes):
            sizes = self._sizes(number, finished)
            finished = min(finished, whole_parts(prefix, self._dtype, self._work.scratch, sizes))
        return finished

    def _log_resumption(self) -> None:
        unused = len(self._parts.results) - self.taken_up
        logger.info("going on with an unfinished run: %d of %d pieces are finished", self.taken_up, self.pieces)
        if unused:
            logger.warning("%d finished pieces belong to inputs that have changed or are not given: not used", unused)
