"""Records of instruction data to samples, the work of its worker processes, and the account of what became of each.

    record -> turns (formats) -> ids and mask (chat)

Samples, account and the first bad record are the same for any number of workers.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_mixtral.data.account import Account, BadRecords
from megatron_mixtral.data.corpus import BadRecord, parse_object
from megatron_mixtral.data.instruction.formats import HANDLERS, detect
from megatron_mixtral.data.instruction.messages import Dialogue
from megatron_mixtral.data.instruction.options import InstructionOptions
from megatron_mixtral.tokenizer import Tokenizer, chat, special_tokens

Record = tuple[str, Any]  # its place, and a line as bytes or the record itself


@dataclass
class SampleCounts:
    """What became of some records that are not bad: records = samples + too_long + bad ones."""

    records: int = 0
    samples: int = 0
    too_long: int = 0
    too_long_tokens: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest_sample: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    left_out_of_samples: Counter[str] = field(default_factory=Counter)

    def add(self, other: "SampleCounts") -> None:
        """Take in the counts of the records that follow."""
        longest = max(self.longest_sample, other.longest_sample)
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        self.longest_sample = longest


@dataclass(frozen=True)
class Batch:
    """The samples of some records, one behind the other: `ids` int32 (total,), `trained` bool (total,), `lengths` int64
    (samples,), and the account of the records.
    """

    ids: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray
    counts: SampleCounts
    bad: BadRecords


@dataclass
class InstructionAccount(Account):
    """Sums over all batches so far."""

    counts: SampleCounts = field(default_factory=SampleCounts)

    def add(self, batch: Batch) -> None:
        """Take in the next batch (in order). Raises `DataError` where it stopped at a bad record."""
        self.add_bad(batch.bad)
        self.counts.add(batch.counts)

    def left_out(self) -> str:
        """What is not in the output, in words; empty where all of it is."""
        parts = [f"{number} records skipped: {reason}" for reason, number in sorted(self.skipped.items())]
        if self.counts.too_long:
            parts.append(f"{self.counts.too_long} samples of {self.counts.too_long_tokens} tokens longer than "
                         "--seq-length + 1")  # fmt: skip
        parts += [f"{number} times {what}" for what, number in sorted(self.counts.left_out_of_samples.items())]
        return "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """The counts in the words of the report."""
        counts = vars(self.counts) | {
            "formats": dict(self.counts.formats.most_common()),
            "left_out_of_samples": dict(sorted(self.counts.left_out_of_samples.items())),
        }
        return {**super().as_dict(), **counts}


class Renderer:
    """The work of a run: some records to their samples."""

    def __init__(self, options: InstructionOptions, tokenizer: Tokenizer) -> None:
        """Raises `ConfigError` or `DataError` where flags, template and tokenizer do not go together."""
        self._handler, self._skip = options.handler, options.skip_bad
        self._template_name, self._tokenizer = options.template_name, tokenizer
        self._template = chat.TEMPLATES[options.template_name]
        self._most = None if options.seq_length is None else options.seq_length + 1
        self._end = special_tokens(tokenizer, options.prepend_bod, options.append_eod)
        chat.check_template(self._template, tokenizer)

    def run(self, records: Sequence[Record]) -> Batch:
        """The samples of these records; up to the first bad one unless such are skipped."""
        counts, bad, ids, trained = SampleCounts(), BadRecords(), [np.zeros(0, np.int32)], [np.zeros(0, bool)]
        for where, raw in records:
            counts.records += 1
            try:
                sample = self._render(raw, counts)
            except BadRecord as error:
                bad.add(where, error, self._skip)
                if bad.failed:
                    break
                continue
            if self._fits(*sample, counts):
                ids.append(sample[0])
                trained.append(sample[1])
        lengths = np.array([one.size for one in ids[1:]], dtype=np.int64)
        return Batch(np.concatenate(ids), np.concatenate(trained), lengths, counts, bad)

    def place(self, records: Sequence[Record]) -> str:
        """See `Work.place`."""
        return f"the records from {records[0][0]} on"

    def _fits(self, ids: np.ndarray, trained: np.ndarray, counts: SampleCounts) -> bool:
        """Whether a sample is in the output; it is counted."""
        if self._most is not None and ids.size > self._most:
            counts.too_long += 1
            counts.too_long_tokens += ids.size
            return False
        counts.samples += 1
        counts.tokens += ids.size
        counts.trained_tokens += int(trained[1:].sum())
        counts.longest_sample = max(counts.longest_sample, ids.size)
        return True

    def _check_tools(self, dialogue: Dialogue) -> None:
        """`BadRecord` for calls and results that the template cannot write; a list of tools nobody calls is counted."""
        if self._template.calls:
            return
        if any(turn.calls or turn.results for turn in dialogue.turns):
            raise BadRecord("tool_message", "a message calls a tool or answers for one, which --prompt-type "
                            f"{self._template_name} has no words for: take mixtral-v3 with the tokenizer of "
                            "Mixtral-8x22B-Instruct, or leave such records out (--on-error skip)")
        if any(turn.tools for turn in dialogue.turns):
            dialogue.left_out["tools_not_written"] = 1

    def _render(self, raw: Any, counts: SampleCounts) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32, trained bool) of a record."""
        record = parse_object(raw) if isinstance(raw, bytes) else raw
        if not isinstance(record, dict):
            raise BadRecord("not_an_object", f"expected an object, found {str(record)[:40]!r}")
        name = detect(record) if self._handler == "auto" else self._handler
        dialogue = HANDLERS[name](record)
        self._check_tools(dialogue)
        ids, trained = chat.render(dialogue.turns, self._template, self._tokenizer)
        if self._end.eos_id is not None and (ids.size == 0 or ids[-1] != self._end.eos_id):
            ids, trained = np.append(ids, np.int32(self._end.eos_id)), np.append(trained, dialogue.turns[-1].loss)
        if not trained[1:].any():
            raise BadRecord("nothing_to_predict", "no token of an answer has a token before it")
        counts.formats[name] += 1
        counts.left_out_of_samples.update(dialogue.left_out)
        return ids, trained
