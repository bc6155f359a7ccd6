"""`chat` in a terminal, at two tensor-parallel ranks that it starts itself: typed, read, interrupted, ended."""

import os
import pty
import select
import sys
import time
from pathlib import Path

from helpers.events import HANG
from helpers.models import tiny_hf_mixtral

from examples.quickstart.hf_tokenizer import write_hf_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CTRL_C, PROMPT = b"\x03", "\n> "


class Typist:
    """Types into a program, and reads what it shows."""

    def __init__(self, argv: list[str]) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment = kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, *argv], environment)
        self.shown = ""

    def type(self, text: bytes) -> None:
        os.write(self._terminal, text)

    def read(self) -> None:
        """What is shown next, if anything is within a second."""
        if select.select([self._terminal], [], [], 1)[0]:
            try:
                self.shown += os.read(self._terminal, 4096).decode(errors="replace").replace("\r\n", "\n")
            except OSError as error:  # the other end is closed
                raise AssertionError(f"it has ended: {self.shown}") from error

    def until(self, found: str) -> str:
        """Read until something is shown; what was shown before it, which is then done with."""
        end = time.monotonic() + HANG
        while found not in self.shown:
            assert time.monotonic() < end, f"{found!r} was not shown: {self.shown}"
            self.read()
        before, _, self.shown = self.shown.partition(found)
        return before

    def end(self) -> int:
        """Wait for the program's end; its exit status."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_chat_at_tp2_in_a_terminal(tmp_path):
    """No answer ends by itself, so each is stopped; the last two Ctrl-C have no line between them."""
    folder = tiny_hf_mixtral(tmp_path / "tiny", vocab_size=32000, max_position_embeddings=32768)
    write_hf_tokenizer(folder)
    typist = Typist([str(ROOT / "tools" / "chat_mixtral.py"), "--load", str(folder), "--max-tokens", "30000",
                     "--max-length", "32768", "--max-slots", "1", "--tensor-model-parallel-size", "2", "--ignore-eos",
                     "--temperature", "1", "--seed", "3"])
    assert "starting 2 ranks on this machine" in typist.until(PROMPT)

    def ask(line: str) -> str:
        """The beginning of an answer."""
        typist.type(line.encode() + b"\n")
        typist.until(line + "\n")  # the terminal shows what is typed
        while len(typist.shown) < 40:  # tokens appear as they come
            typist.read()
        typist.type(CTRL_C)
        answer = typist.until("\n(stopped)\n")
        typist.until(PROMPT)
        return answer[:20]

    first = ask("Hello \u4f60\u597d \U0001f600")
    assert ask("Hello \u4f60\u597d \U0001f600") != first, "this one has the first before it"
    typist.type(b"/clear\n")
    assert typist.until(PROMPT) == "/clear\n(forgotten)\n"
    typist.type(b"half a line" + CTRL_C)
    assert "(Ctrl-C once more ends)" in typist.until(PROMPT)
    assert ask("Hello \u4f60\u597d \U0001f600") == first
    typist.type(CTRL_C)
    assert typist.end() == 0
