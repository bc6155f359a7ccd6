"""A conversation in a pseudo-terminal, on an engine without a model: history, commands, Ctrl-C, the terminal after."""

import os
import pty
import termios
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from helpers.fake_engine import fake_generator

from examples.quickstart.hf_tokenizer import write_hf_tokenizer
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.inference import Event, SamplingParams
from megatron_mixtral.inference.chat import Conversation, Lines
from megatron_mixtral.tokenizer import chat_prompts, load_tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_hf_tokenizer(folder)
    tokenizer = load_tokenizer("HuggingFaceTokenizer", folder / "tokenizer.json")
    return tokenizer, folder


class Room:
    """A terminal, a model that answers with what it was asked, and what the user sees."""

    def __init__(self, parts, template="mixtral"):
        self.tokenizer, folder = parts
        self.keyboard, self.screen = pty.openpty()
        self.asked, self.seen, self.params, self.adapters = [], "", None, []
        self.prompts = chat_prompts(self.tokenizer, folder, template)
        self.generator = SimpleNamespace(stream=self.stream, engine=fake_generator(self.tokenizer).engine)

    def stream(self, ids: list[int], params: SamplingParams) -> Iterator[Event]:
        if len(ids) > 200:
            raise ConfigError(f"the prompt has {len(ids)} tokens")
        self.asked.append(self.tokenizer.decode(ids))
        self.params = params
        self.adapters.append(params.adapter)
        for number, word in enumerate((" one", " two", " \U0001f600")):
            if number == 2 and self.asked[-1].endswith("stop me [/INST]"):
                os.write(self.keyboard, b"\x03")
            yield Event("a", 0, (5,), word, finish_reason="stop" if number == 2 else None)

    def say(self, text: str) -> None:
        self.seen += text
        if text.endswith("> ") and self.script:
            os.write(self.keyboard, self.script.pop(0))

    def talk(self, *script: bytes, system: str = "", adapter: bool = False) -> str:
        """What is seen when this is typed, each at a prompt of its own."""
        self.script = [*script, b"/quit\n"]
        with Lines(self.screen) as lines:
            Conversation(self.generator, self.prompts, SamplingParams(), lines, self.say, system, adapter).run()
        return self.seen


def test_history_and_commands(parts):
    room = Room(parts)
    seen = room.talk("Hello 你好\n".encode(), b"Again\n", b"Third\n", b"/system Be kind.\n", b"New\n", b"/clear\n",
                     b"Newer\n", b"/what\n", b"\n")
    assert room.asked == ["[INST] Hello 你好 [/INST]",
                          "[INST] Hello 你好 [/INST] one two \U0001f600 [INST] Again [/INST]",
                          "[INST] Hello 你好 [/INST] one two \U0001f600 [INST] Again [/INST] one two \U0001f600 "
                          "[INST] Third [/INST]",
                          "[INST] Be kind.\n\nNew [/INST]", "[INST] Be kind.\n\nNewer [/INST]"]
    assert seen.count("> one two \U0001f600\n") == 5 and seen.count("(forgotten)") == 2
    assert seen.count("/clear forgets") == 2, "at the start, and for a command that there is not"


def test_adapters_on_and_off(parts):
    room = Room(parts)
    seen = room.talk(b"One\n", b"/adapter off\n", b"Two\n", b"/adapter on\n", b"Three\n", b"/adapter\n", adapter=True)
    assert room.adapters == [True, False, True] and "(adapters are off)" in seen and "[INST] Three" in room.asked[2]
    assert seen.count("/adapter off asks the model without") == 2, "at the start, and for half a command"
    plain = Room(parts)
    assert "/adapter" not in plain.talk(b"One\n").partition("> ")[0]


def test_ctrl_c_stops_an_answer_and_the_next_one_ends(parts):
    room = Room(parts)
    seen = room.talk(b"stop me\n", b"and then\n", b"/clear\n", b"stop me\n", b"\x03", b"never\n")
    assert seen.count("(stopped)") == 2 and len(room.asked) == 3
    assert room.asked[1] == "[INST] stop me [/INST] one two \U0001f600 [INST] and then [/INST]", "it is remembered"


def test_ctrl_c_drops_a_line_and_a_second_one_ends(parts):
    room = Room(parts)
    seen = room.talk(b"half\x03", b"whole\n", b"half\x03", b"\x03", b"never\n")
    assert room.asked == ["[INST] whole [/INST]"] and seen.count("(Ctrl-C once more ends)") == 2


def test_the_end_of_input_and_a_question_that_does_not_fit(parts):
    room = Room(parts)
    seen = room.talk(b"word " * 300 + b"\n", b"short\n", b"\x04", system="Be kind.")
    assert "tokens; /clear begins anew)" in seen and room.asked == ["[INST] Be kind.\n\nshort [/INST]"]
    assert "cuts a line at 4095 bytes" in Room(parts).talk(b"x" * 5000 + b"\n")


def test_the_terminal_is_as_before(parts):
    room = Room(parts)
    before = termios.tcgetattr(room.screen)
    with Lines(room.screen) as lines:
        during = termios.tcgetattr(room.screen)
        assert during[6][termios.VINTR] != before[6][termios.VINTR] and lines.is_terminal
    assert termios.tcgetattr(room.screen) == before


def test_lines_of_a_pipe_and_what_happens_meanwhile():
    out, into = os.pipe()
    calls = []

    def idle() -> None:
        calls.append(1)
        if len(calls) == 3:
            os.write(into, "one 你".encode()[:-1])
        if len(calls) == 4:
            os.write(into, "你".encode()[-1:] + b"\ntwo\nlast")
            os.close(into)

    with Lines(out) as lines:
        assert [lines.next(idle, 0.001) for _ in range(4)] == ["one 你", "two", "last", None]
    assert len(calls) == 4, "the other ranks hear from this one while it waits"


def test_an_answer_ends_where_its_template_says(parts):
    room = Room(parts, "chatml")
    room.talk(b"Hello\n")
    assert room.params.stop == ("<|im_end|>",)
