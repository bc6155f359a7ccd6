"""Signals that end a run: SIGTERM, SIGINT, SIGHUP and `--exit-signal`, before and after the first step."""

import os
import select
import signal
import sys
from collections.abc import Callable
from types import FrameType


def end_at_signals(exit_signal: int) -> Callable[[], None]:
    """Until the function returned is called, they end the process at once: there is nothing to save, and a rank that
    waits for another one inside a library would not hear them. From then on they do what the engine does at
    `exit_signal`: save after the step under way, and end. SIGHUP stays ignored where it is (nohup).
    """
    numbers, save_and_end = {exit_signal, signal.SIGTERM, signal.SIGINT}, signal.getsignal(exit_signal)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.add(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)

    def end(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            let_go_of_lost_outputs()
        save_and_end(number, frame)

    def save_first() -> None:
        for number in numbers:
            signal.signal(number, end)

    return save_first


def let_go_of_lost_outputs() -> None:
    """Send output to nowhere where nobody is left to read it: a terminal that was closed, or a pipe to a program that
    ended with it. The next line that the engine prints would otherwise be an error, and end the run before it saves.
    """
    for descriptor in (sys.__stdout__.fileno(), sys.__stderr__.fileno()):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
