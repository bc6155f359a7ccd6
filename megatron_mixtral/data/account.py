"""What became of the records of a run: every one is in the output or counted with a reason, and nothing is passed over.

A worker notes the bad records of its piece of work (`BadRecords`); the parent adds the pieces up in order (`Account`).
`text/account.py` and `instruction/rendering.py` count what else belongs to their kind of data.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_mixtral.data.corpus import BadRecord, LineCounts
from megatron_mixtral.errors import DataError

logger = logging.getLogger(__name__)

SHOWN_OF_A_PIECE, SHOWN_OF_A_RUN = 50, 1000  # bad records that are listed; the counts are always complete


@dataclass
class Shown:
    """A bad record. `place` is its line within the piece, or its place in words."""

    place: int | str
    reason: str
    message: str


@dataclass
class BadRecords:
    """The bad records of a piece of work: all by their reasons, the first ones in full. `failed`: the work stopped at
    the (only) one, since bad records are not left out.
    """

    reasons: dict[str, int] = field(default_factory=dict)
    shown: list[Shown] = field(default_factory=list)
    failed: bool = False

    def add(self, place: int | str, error: BadRecord, skip: bool) -> None:
        self.reasons[error.reason] = self.reasons.get(error.reason, 0) + 1
        if len(self.shown) < SHOWN_OF_A_PIECE:
            self.shown.append(Shown(place, error.reason, str(error)))
        self.failed = not skip


@dataclass
class Account:
    """Sums over all pieces so far: lines read, bad records by their reasons, and the first of these in full."""

    lines: LineCounts = field(default_factory=LineCounts)
    skipped: Counter[str] = field(default_factory=Counter)
    listed: list[dict[str, str]] = field(default_factory=list)

    def add_bad(self, bad: BadRecords, where: Callable[[Any], str] = str) -> None:
        """Take in the bad records of the next piece; `where` makes a place in the input of the place in the piece.

        Raises `DataError` where the piece has stopped at one.
        """
        for one in bad.shown:
            place = where(one.place)
            if bad.failed:
                raise DataError(
                    f"{place}: {one.reason}: {one.message}. To leave such records out: --on-error skip"
                )
            if len(self.listed) < SHOWN_OF_A_RUN:
                self.listed.append({"where": place, "reason": one.reason, "message": one.message})
                logger.warning("skipped %s: %s: %s", place, one.reason, one.message)
        self.skipped.update(bad.reasons)

    def as_dict(self) -> dict[str, Any]:
        """The counts in the words of the report."""
        return {
            "lines": self.lines.lines,
            "blank_lines": self.lines.blank,
            "bytes": self.lines.bytes,
            "byte_order_marks_removed": self.lines.boms,
            "skipped": dict(sorted(self.skipped.items())),
            "skipped_records": self.listed,
        }
