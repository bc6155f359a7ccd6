"""`chat` in a terminal, at two tensor-parallel ranks that it starts itself: typed, read, interrupted, ended."""

import os
import pty
import re
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
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
            for name in ("RANK", "WORLD_SIZE"):
                os.environ.pop(name, None)
            os.execv(sys.executable, [sys.executable, *argv])
        self.shown = ""

    def type(self, text: bytes) -> None:
        os.write(self._terminal, text)

    def until(self, found: str) -> str:
        """Read until something is shown; what was shown before it, which is then done with."""
        end = time.monotonic() + HANG
        while found not in self.shown:
            assert time.monotonic() < end, self.shown
            if select.select([self._terminal], [], [], 1)[0]:
                try:
                    self.shown += os.read(self._terminal, 4096).decode(errors="replace").replace("\r\n", "\n")
                except OSError as error:  # the other end is closed
                    raise AssertionError(f"ended without {found!r}: {self.shown}") from error
        before, _, self.shown = self.shown.partition(found)
        return before

    def end(self) -> int:
        """Wait for the program's end; its exit status."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_chat_at_tp2_in_a_terminal(tmp_path):
    folder = tiny_hf_mixtral(tmp_path / "tiny", vocab_size=32000, max_position_embeddings=4096)
    write_hf_tokenizer(folder)
    typist = Typist([str(ROOT / "tools" / "chat_mixtral.py"), "--load", str(folder), "--max-tokens", "8",
                     "--tensor-model-parallel-size", "2", "--temperature", "1", "--seed", "3", "--ignore-eos"])
    assert "starting 2 ranks on this machine" in typist.until(PROMPT)

    def ask(line: str) -> str:
        typist.type(line.encode() + b"\n")
        typist.until(line + "\n")  # the terminal shows what is typed
        return typist.until(PROMPT).strip("\n")

    first = ask("Hello \u4f60\u597d \U0001f600")
    assert first and ask("Hello \u4f60\u597d \U0001f600") != first, "the second question has the first before it"
    assert ask("/clear") == "(forgotten)" and ask("Hello \u4f60\u597d \U0001f600") == first
    assert ask("/system Be kind.") == "(forgotten)" and ask("Hello \u4f60\u597d \U0001f600") != first
    assert "/clear forgets" in ask("/what")
    typist.type(b"half a line" + CTRL_C)
    assert "(Ctrl-C once more ends)" in typist.until(PROMPT)
    typist.type(b"/quit\n")
    assert typist.end() == 0


def test_ctrl_c_stops_an_answer_and_twice_it_ends_all_ranks(tmp_path):
    folder = tiny_hf_mixtral(tmp_path / "tiny", vocab_size=32000, max_position_embeddings=32768)
    write_hf_tokenizer(folder)
    typist = Typist([str(ROOT / "tools" / "chat_mixtral.py"), "--load", str(folder), "--max-tokens", "30000",
                     "--max-length", "32768", "--max-slots", "1", "--ignore-eos", "--temperature", "1"])
    typist.until(PROMPT)
    typist.type(b"Hello\n")
    typist.until("Hello\n")
    while len(re.sub(r"\s", "", typist.shown)) < 50:  # tokens appear as they come
        typist.until(" ")
    typist.type(CTRL_C)
    typist.until("(stopped)")
    typist.until(PROMPT)
    typist.type(CTRL_C)
    assert typist.end() == 0
