"""Records of instruction data to samples, in worker processes, and the account of what became of each record.

    record -> turns (instruction_formats) -> ids and mask (chat)

`data/instruction/run.py` calls `render_records`. The batches come in the order of the records, whatever the workers
do, so
samples, account and the first bad record are the same for any number of them.
"""

import itertools
import logging
import signal
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields
from multiprocessing import get_context
from typing import Any

import numpy as np

from megatron_mixtral.data.cli import Options
from megatron_mixtral.data.corpus.records import BadRecord, parse_object
from megatron_mixtral.data.instruction.formats import HANDLERS, BadDialogue, detect
from megatron_mixtral.data.processes import start_method
from megatron_mixtral.errors import DataError
from megatron_mixtral.tokenizer.chat import TEMPLATES, check_template, render
from megatron_mixtral.tokenizer.encode import special_tokens
from megatron_mixtral.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BAD_RECORDS_REPORTED = 1000
RECORDS_PER_BATCH = 256
BATCHES_PER_WORKER = 4  # handed out ahead

Record = tuple[str, Any]  # its place, and a line as bytes or the record itself


@dataclass
class Counts:
    """The account of a run: records = samples + too_long + sum of skipped."""

    records: int = 0
    samples: int = 0
    too_long: int = 0
    too_long_tokens: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    skipped_records: list[dict[str, str]] = field(default_factory=list)

    def add(self, other: "Counts") -> None:
        """Take in the account of the records that follow; those that were skipped are logged, up to a number."""
        longest = max(self.longest, other.longest)
        room = max(BAD_RECORDS_REPORTED - len(self.skipped_records), 0)
        shown = other.skipped_records[:room]
        for skipped in shown:
            logger.warning("skipped %s: %s: %s", skipped["where"], skipped["reason"], skipped["message"])
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        self.longest = longest
        del self.skipped_records[BAD_RECORDS_REPORTED:]


@dataclass(frozen=True)
class Batch:
    """The samples of some records, one behind the other: `ids` int32 (total,), `trained` bool (total,), `lengths` int64
    (samples,), and the account of the records.
    """

    ids: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray
    counts: Counts


def render_records(records: Iterable[Record], renderer: "Renderer", workers: int) -> Generator[Batch, None, None]:
    """All records in their order, by worker processes; in this one when `workers` is 1.

    Raises `DataError` for the first bad record, with its place, unless such records are skipped, and for a worker that
    died.
    """
    batches = itertools.batched(records, RECORDS_PER_BATCH)
    if workers == 1:
        yield from map(renderer.batch, batches)
        return
    pool = ProcessPoolExecutor(workers, get_context(start_method()), _start_worker, (renderer,))
    try:
        yield from _in_order(pool, batches, BATCHES_PER_WORKER * workers)
    except BrokenProcessPool as error:
        raise DataError(
            "A worker process died. If the machine ran out of memory, use fewer --workers. Nothing is written."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, batches: Iterable[tuple[Record, ...]], ahead: int) -> Iterator[Batch]:
    waiting: deque[Future[Batch]] = deque()
    for batch in batches:
        waiting.append(pool.submit(_render_batch, batch))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _start_worker(renderer: "Renderer") -> None:
    global _renderer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _renderer = renderer


def _render_batch(records: tuple[Record, ...]) -> Batch:
    return _renderer.batch(records)


class Renderer:
    """One record to one sample, and its place in the account."""

    def __init__(self, options: Options, tokenizer: Tokenizer) -> None:
        """Raises `ConfigError` or `DataError` where flags, template and tokenizer do not go together."""
        self._handler, self._skip = options.handler, options.on_error == "skip"
        self._template, self._tokenizer = TEMPLATES[options.prompt_type], tokenizer
        self._most = None if options.seq_length is None else options.seq_length + 1
        self._end = special_tokens(tokenizer, options.prepend_bod, options.append_eod)
        check_template(self._template, tokenizer)

    def batch(self, records: Iterable[Record]) -> Batch:
        """The samples of these records; `DataError` for a bad one unless such are skipped."""
        counts, ids, trained = Counts(), [np.zeros(0, np.int32)], [np.zeros(0, bool)]
        for where, raw in records:
            if (sample := self._sample(where, raw, counts)) is not None:
                ids.append(sample[0])
                trained.append(sample[1])
        lengths = np.array([one.size for one in ids[1:]], dtype=np.int64)
        return Batch(np.concatenate(ids), np.concatenate(trained), lengths, counts)

    def _sample(self, where: str, raw: Any, counts: Counts) -> tuple[np.ndarray, np.ndarray] | None:
        """(ids int32, trained bool), or None for a record that is counted and left out; `DataError` where it is not."""
        counts.records += 1
        try:
            ids, trained = self._render(raw, counts)
        except (BadDialogue, BadRecord) as error:
            if not self._skip:
                hint = "To leave such records out: --on-error skip"
                raise DataError(f"{where}: {error.reason}: {error}. {hint}") from error
            counts.skipped[error.reason] += 1
            counts.skipped_records.append({"where": where, "reason": error.reason, "message": str(error)})
            return None
        if self._most is not None and ids.size > self._most:
            counts.too_long += 1
            counts.too_long_tokens += ids.size
            return None
        counts.samples += 1
        counts.tokens += ids.size
        counts.trained_tokens += int(trained[1:].sum())
        counts.longest = max(counts.longest, ids.size)
        return ids, trained

    def _render(self, raw: Any, counts: Counts) -> tuple[np.ndarray, np.ndarray]:
        record = parse_object(raw) if isinstance(raw, bytes) else raw
        if not isinstance(record, dict):
            raise BadRecord("not_an_object", f"expected an object, found {str(record)[:40]!r}")
        name = detect(record) if self._handler == "auto" else self._handler
        dialogue = HANDLERS[name](record)
        ids, trained = render(dialogue.turns, self._template, self._tokenizer)
        if self._end.eos_id is not None and (ids.size == 0 or ids[-1] != self._end.eos_id):
            ids, trained = np.append(ids, np.int32(self._end.eos_id)), np.append(trained, dialogue.turns[-1].loss)
        if not trained[1:].any():
            raise BadDialogue("nothing_to_predict", "no token of an answer has a token before it")
        counts.formats[name] += 1
        counts.left_out.update(dialogue.left_out)
        return ids, trained
