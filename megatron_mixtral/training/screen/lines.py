"""The lines on the screen: rank 0's summary, the steps, what goes wrong. On a terminal also a live line.

Library code logs as everywhere. A record of a step has a short form for the screen beside its message, and where the
run is: `extra={"shown": "step 3/6 | ...", "status": ..., "step": 3, "last": 6}`.
"""

import logging
import os
import textwrap
import time
from typing import Any, TextIO

WIDTH = 100
EVERY = 5.0  # seconds between two lines of steps on a terminal
PACKAGE = __name__.partition(".")[0]
TRAINING = f"{PACKAGE}.training"
METRICS = f"{TRAINING}.metrics"


class Lines(logging.Handler):
    """Writes what the user is to see of a rank to `stream`."""

    def __init__(self, stream: TextIO, rank: int, level: str) -> None:
        super().__init__(level.upper())
        self._stream, self._rank = stream, rank
        self._live = _Live(stream) if stream.isatty() else None

    def filter(self, record: logging.LogRecord) -> bool:
        """Ours alone, and of what is no warning the run's. Every rank has errors, the rank of the metrics these, and
        rank 0 speaks for all others.
        """
        if not record.name.startswith(TRAINING if record.levelno < logging.WARNING else PACKAGE):
            return False
        return self._rank == 0 or record.levelno >= logging.ERROR or record.name.startswith(METRICS)

    def emit(self, record: logging.LogRecord) -> None:
        """One line for a step, cut where it would be too long; a sentence is wrapped instead."""
        width = self._width()
        line = getattr(record, "shown", None)
        while line is not None and len(line) > width and " | " in line:
            line = line.rpartition(" | ")[0]
        if line is None:
            line = textwrap.fill(_words(record, self._rank), width, subsequent_indent="  ", break_long_words=False,
                                 break_on_hyphens=False)
        if self._live is None:
            self._stream.write(line + "\n")
        elif hasattr(record, "status"):
            self._live.step(line, record)
        else:
            self._live.write(line)

    def _width(self) -> int:
        try:
            columns = 0 if self._live is None else os.get_terminal_size(self._stream.fileno()).columns
        except OSError:  # the terminal was closed
            columns = 0
        return min(WIDTH, columns - 1 if columns > 1 else WIDTH)

    def close(self) -> None:
        """The live line goes."""
        if self._live is not None:
            self._live.close()
        self._stream.flush()
        super().close()


def _words(record: logging.LogRecord, rank: int) -> str:
    message = record.getMessage()
    if record.levelno >= logging.WARNING:
        kind = "error" if record.levelno >= logging.ERROR else "warning"
        return f"{kind}: {message}" if rank == 0 else f"{kind}, rank {rank}: {message}"
    return message


class _Live:
    """A status line at the end of a terminal, and the lines above it. tqdm knows how wide the terminal is."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._bar, self._said = stream, None, 0.0

    def step(self, line: str, record: Any) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=record.last, file=self._stream, leave=False, dynamic_ncols=True, mininterval=0,
                             bar_format="{desc} |{bar}|" if record.last else "{desc}")
        if time.monotonic() - self._said >= EVERY or record.step == record.last:
            self._said = time.monotonic()
            self.write(line)
        self._bar.n = record.step
        self._bar.set_description_str(record.status)

    def write(self, line: str) -> None:
        """A line above the status; that may be another rank's, which draws it again at its next step."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            self._stream.write(f"\r\x1b[K{line}\n")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
