"""Lines from a terminal, or from a file or pipe, without ever waiting long: other ranks want to hear from this one.

Ctrl-C has to stop an answer and not the program. torchrun starts its ranks in sessions of their own, where the signal
of Ctrl-C does not come: it would reach torchrun alone, which would end all ranks. So as long as a chat lasts, Ctrl-C
makes no signal but ends a line, as Enter does, and the line ends in `\\x03`.
"""

import os
import select
import signal
import termios
from collections.abc import Callable
from types import FrameType
from typing import Any

CTRL_C = b"\x03"
LONGEST = 4095  # bytes of a line, of which a terminal drops the rest without a word


class Interrupt(Exception):
    """Ctrl-C was pressed."""


class Lines:
    """The lines of a file descriptor. As a context, it has the terminal's settings changed, and puts them back."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._left, self._ended = descriptor, b"", False
        self.is_terminal = os.isatty(descriptor)
        self._before: list[Any] | None = None

    def __enter__(self) -> "Lines":
        if self.is_terminal:
            self._before = termios.tcgetattr(self._descriptor)
            changed = termios.tcgetattr(self._descriptor)
            changed[6][termios.VINTR] = b"\0"  # no key
            changed[6][termios.VEOL] = CTRL_C
            termios.tcsetattr(self._descriptor, termios.TCSANOW, changed)
            signal.signal(signal.SIGTERM, _leave)  # of torchrun, when another rank has ended
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            termios.tcsetattr(self._descriptor, termios.TCSANOW, self._before)

    def next(self, idle: Callable[[], object], seconds: float) -> str | None:
        """The next line without its end; None at the end of all. Calls `idle` every so many seconds while it waits.

        Raises `Interrupt`.
        """
        while b"\n" not in self._left and not self._ended:
            if select.select([self._descriptor], [], [], seconds)[0]:
                self._read()
            else:
                idle()
        if not self._left:
            return None
        line, _, self._left = self._left.partition(b"\n")
        return line.decode(errors="replace")

    def check(self) -> None:
        """Raises `Interrupt` if Ctrl-C was pressed. Takes nothing else: a line that is already there waits."""
        if self.is_terminal and not self._ended and select.select([self._descriptor], [], [], 0)[0]:
            self._read()

    def _read(self) -> None:
        found = os.read(self._descriptor, 2**16)
        self._ended = not found
        if self.is_terminal and found.endswith(CTRL_C):
            self._left = b""
            raise Interrupt
        self._left += found


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
