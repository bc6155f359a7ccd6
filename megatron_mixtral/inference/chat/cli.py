"""The command `chat`: questions from the terminal, answers as they are written, at any layout."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

from megatron_mixtral.command_line import Parser
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.inference.chat.terminal import LONGEST, Interrupt, Lines
from megatron_mixtral.inference.cli import (
    leading,
    model_flags,
    open_generator,
    prompts_of,
    sampling_flags,
    sampling_params,
    template_flag,
    with_ends,
)
from megatron_mixtral.inference.generator import Generator
from megatron_mixtral.inference.parameters import SamplingParams
from megatron_mixtral.runtime import launch

HEARTBEAT = 1.0  # seconds after which the other ranks hear from this one while it waits for a line
HELP = ("/clear forgets what was said; /system TEXT does, too, and sets the system text; /quit ends. "
        "Ctrl-C stops an answer, twice it ends.")
OF_ADAPTERS = " /adapter off asks the model without its adapters, /adapter on with them."


def chat(argv: Sequence[str]) -> int:
    """Talk to a model. Returns 0, or 1 on a rank that leaves it to another to say what is wrong."""
    parser = Parser(description="Talk to a Mixtral in the terminal.", epilog=HELP, allow_abbrev=False)
    model_flags(parser)
    sampling_flags(parser)
    template_flag(parser, "one of training's (mixtral, chatml, ...); default: the model's own chat_template.jinja, "
                          "else mixtral")
    parser.add_argument("--system", default="", metavar="TEXT", help="system text")
    parser.set_defaults(max_tokens=512)
    args = parser.parse_args(argv)
    params = sampling_params(args)
    if params.n != 1 or params.logprobs is not None:
        raise ConfigError("a chat has one answer, and shows no log-probabilities: leave out --num-samples and "
                          "--logprobs")

    def work() -> None:
        generator = open_generator(args, "chat", argv)
        prompts = prompts_of(generator, args.prompt_template)
        with leading(generator) as is_first:
            if is_first:
                for _ in generator.stream("", SamplingParams(max_tokens=1)):
                    pass  # what the first pass has to say (warnings of the libraries) comes before the first prompt
                with Lines(sys.stdin.fileno()) as lines:
                    Conversation(generator, prompts, params, lines, _say, args.system, args.adapter is not None).run()

    return launch.as_rank(work)


def _say(text: str) -> None:
    print(text, end="", flush=True)


class Conversation:
    """What was said, and the loop that says more. `say` writes to the user."""

    def __init__(self, generator: Generator, prompts: Any, params: SamplingParams, lines: Lines,
                 say: Callable[[str], None], system: str = "", adapter: bool = False) -> None:
        self._generator, self._prompts, self._lines, self._say = generator, prompts, lines, say
        self._params = with_ends(params, prompts)
        self._system, self._said = system, []
        self._adapter, self._help = adapter, f"{HELP}{OF_ADAPTERS if adapter else ''}\n"

    def run(self) -> None:
        """Until /quit, the end of the input, or a second Ctrl-C without a line between."""
        self._say(self._help)
        interrupted = False
        while True:
            self._say("\n> ")
            try:
                line = self._lines.next(self._generator.engine.step, HEARTBEAT)
            except Interrupt:
                if interrupted:
                    break
                interrupted = True
                self._say("\n(Ctrl-C once more ends)")
                continue
            if line is None or line.strip() == "/quit":
                break
            interrupted = False
            if self._lines.is_terminal and len(line.encode()) >= LONGEST:
                self._say(f"(this terminal cuts a line at {LONGEST} bytes, and may have cut yours: give it in parts, "
                          "or by a pipe)\n")
            elif line.startswith("/"):
                self._command(*line.partition(" ")[::2])
            elif line.strip():
                interrupted = self._answer(line)
        self._say("\n")

    def _command(self, name: str, rest: str) -> None:
        if name == "/adapter" and self._adapter and rest.strip() in ("on", "off"):
            self._params = dataclasses.replace(self._params, adapter=rest.strip() == "on")
            self._say(f"(adapters are {rest.strip()})\n")
            return
        if name not in ("/clear", "/system"):
            self._say(self._help)
            return
        self._said = []
        if name == "/system":
            self._system = rest.strip()
        self._say("(forgotten)\n")

    def _answer(self, question: str) -> bool:
        """Answer, and remember both; whether Ctrl-C stopped it. What cannot be asked is said and not remembered."""
        messages = [*self._said, {"role": "user", "content": question}]
        system = [{"role": "system", "content": self._system}] if self._system else []
        text, stopped = "", False
        try:
            for event in self._generator.stream(self._prompts.prompt([*system, *messages]), self._params):
                news = event.text if text else self._prompts.begin(event.text)
                text += news
                self._say(news)
                if event.finish_reason == "error" or (event.finish_reason == "length" and event.message):
                    self._say(f"\n({event.message})")
                self._lines.check()
        except Interrupt:
            stopped = True
            self._say("\n(stopped)")
        except ConfigError as error:
            self._say(f"({error}; /clear begins anew)\n")
            return False
        self._say("\n")
        self._said = [*messages, {"role": "assistant", "content": text}]
        return stopped
