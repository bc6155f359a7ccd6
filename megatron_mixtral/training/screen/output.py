"""Where a rank's output goes: all of it to SAVE/logs/START/rank_N.log, and the few lines for the user to the screen.

The engine prints 800 lines of arguments, and torch and C++ write past Python, so file descriptors 1 and 2 are led to
the file; children inherit them. Ranks agree on START once they can talk to each other. Until then the file has a name
of its own; renaming it does not disturb who writes.
"""

import contextlib
import faulthandler
import io
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from megatron_mixtral.errors import ConfigError, CrashedError, MixtralError
from megatron_mixtral.training.screen.lines import Lines

FOLDER, LATEST = "logs", "latest"


class Output:
    """A context in which a rank runs. With the level "debug" it changes nothing: all comes to the screen.

    Without `save` there is no file, and what is not for the screen is lost. An error that is none of `MixtralError`
    becomes a `CrashedError` where a file has its traceback.
    """

    def __init__(self, save: Path | None, rank: int, level: str) -> None:
        self._folder = None if save is None else save / FOLDER
        self._rank, self._level, self._started = rank, level, time.gmtime()
        self.path: Path | None = None  # of the file
        self._restore: list[Callable[[], Any]] = []

    def __enter__(self) -> "Output":
        """`ConfigError` where the file cannot be made."""
        if self._level == "debug":
            return self
        with self._writing():
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self.path = self._folder / f"starting-{socket.gethostname()}-{os.getpid()}.log"
            file = os.open(self.path or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [os.dup(1), os.dup(2)]
        self._lead(file, file)
        os.close(file)
        streams, handlers = (sys.stdout, sys.stderr), logging.root.handlers[:]
        sys.stdout = sys.stderr = _text(2)
        screen = _text(kept[1])
        logging.root.handlers[:] = [logging.StreamHandler(sys.stderr), Lines(screen, self._rank, self._level)]
        faulthandler.enable(screen if self.path is None else sys.stderr)

        def restore() -> None:
            sys.stdout.flush()
            sys.stdout, sys.stderr = streams
            logging.root.handlers[-1].close()
            logging.root.handlers[:] = handlers
            self._lead(*kept)
            faulthandler.enable(2)

        self._restore.append(restore)
        return self

    def settle(self, agree: Callable[[str], str]) -> None:
        """Give the file its name. `agree` returns rank 0's word on every rank. `ConfigError` where it cannot be."""
        start = agree(self._name_of_start())
        with self._writing():
            self._name(start)
            if self.path is not None and self._rank == 0:
                link = self.path.parents[1] / LATEST
                draft = link.with_name(f".{LATEST}")
                draft.unlink(missing_ok=True)
                draft.symlink_to(self.path.parent.name)
                draft.rename(link)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"the output of rank {self._rank} cannot be kept in {self._folder}: {error}. Clear the "
                              "way or give another --save; with --log-level debug there is no such file") from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if not self._restore:
            return
        with contextlib.suppress(OSError):  # it keeps its first name; what ended the run is the news
            self._name(self._name_of_start())
        if isinstance(error, Exception):
            if isinstance(error, MixtralError):
                sys.stderr.write(f"error: {error}\n")
            else:
                traceback.print_exception(error)
        self._restore.pop()()
        if self.path is None or not isinstance(error, Exception):
            return
        if isinstance(error, MixtralError):
            error.add_note(f"log: {self.path}")
            return
        words = (str(error).strip().splitlines() or [""])[0]
        crashed = CrashedError(f"{type(error).__name__}{': ' * bool(words)}{words}")
        crashed.add_note(f"log, with the traceback: {self.path}")
        raise crashed from error

    def _name_of_start(self) -> str:
        return time.strftime("%Y-%m-%dT%H-%M-%SZ", self._started)

    def _name(self, start: str) -> None:
        if self.path is not None and self.path.parent == self._folder:
            folder, number = self._folder / start, 1
            while (target := folder / f"rank_{self._rank}{f'.{number}' if number > 1 else ''}.log").exists():
                number += 1  # another start within the same second
            folder.mkdir(exist_ok=True)
            self.path = self.path.rename(target)

    @staticmethod
    def _lead(out: int, err: int) -> None:
        os.dup2(out, 1)
        os.dup2(err, 2)


class _Patient(io.FileIO):
    """A full disk, or a terminal that was closed, does not end a run."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _text(descriptor: int) -> TextIO:
    return io.TextIOWrapper(io.BufferedWriter(_Patient(descriptor, "w", closefd=False)), encoding="utf-8",
                            errors="backslashreplace", line_buffering=True)
