"""Messages to the ids that a model is to go on from: a chat's prompt.

A message has a role (system, user, assistant) and a content, as in OpenAI's API. The prompt is written by a template of
ours, the one of training (`chat.py`), or by the model's own (`jinja_template.py`). Either way there is one begin-of-
sequence id at the start, and what stands in a message is text: only the template writes control tokens.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.tokenizer.chat import TEMPLATES, Turn, check_template, render
from megatron_mixtral.tokenizer.jinja_template import compile_template, find_template
from megatron_mixtral.tokenizer.tokenizer import Tokenizer, declared_specials

logger = logging.getLogger(__name__)

Message = Mapping[str, str]
DEFAULT, THE_MODELS = "mixtral", "model"
_MARK = "\ue000"  # of private use: put into a control token's name that stands in a message, so that it is none


def chat_prompts(tokenizer: Tokenizer, directory: str | Path, name: str | None = None) -> "OwnPrompts | ModelPrompts":
    """How a model is asked: by the template `name` of ours, else the one that lies in its directory, else Mixtral's.
    The name "model" is the one in its directory and no other.

    Raises `ConfigError` for an unknown name or one that the tokenizer cannot write, or without jinja2 where a template
    needs it; `DataError` for a template that cannot be read.
    """
    if name not in (None, THE_MODELS, *TEMPLATES):
        raise ConfigError(f"--prompt-template {name} is not one of: {THE_MODELS}, {', '.join(TEMPLATES)}.")
    found = find_template(Path(directory)) if name in (None, THE_MODELS) else None
    if name == THE_MODELS and found is None:
        raise ConfigError(f"--prompt-template {name}: {directory} brings no chat template; name one of ours: "
                          f"{', '.join(TEMPLATES)}.")
    if found is not None:
        return ModelPrompts(tokenizer, *found, declared_specials(found[1].parent))
    if name is None:
        logger.info("%s brings no chat template, so its prompts are written as %s's (--prompt-template NAME: %s)",
                    directory, DEFAULT, ", ".join(TEMPLATES))
    return OwnPrompts(tokenizer, name or DEFAULT)


@dataclass(frozen=True)
class Ends:
    """What ends an answer beside the model's own stop ids."""

    ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()


class _Prompts:
    """What both kinds have: `name`, `ends`, and the tokenizer's way with a first space."""

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        self.name, self.ends, self._tokenizer = name, Ends(), tokenizer
        self._spaced = tokenizer.encode("a") == tokenizer.encode("b a")[1:]  # puts a space before every text

    def begin(self, text: str) -> str:
        """The beginning of an answer without the space that the tokenizer puts before every text, and before this one
        when it comes back in a later prompt.
        """
        return text.removeprefix(" ") if self._spaced else text


class OwnPrompts(_Prompts):
    """Prompts as training writes them."""

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        super().__init__(tokenizer, name)
        self._template = TEMPLATES[name]
        check_template(self._template, tokenizer)
        self.ends = self._ends()

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation up to where its next answer begins. Raises `DataError` unless roles alternate."""
        check_roles(messages)
        turns, system, question = [], "", None
        for message in messages:
            content = message["content"]
            if message["role"] == "system":
                system = content
            elif message["role"] == "user":
                question = content
            else:
                turns.append(Turn(question, content, system))
                system, question = "", None
        turns.append(Turn(question, None, system))
        return render(turns, self._template, self._tokenizer)[0].tolist()

    def _ends(self) -> Ends:
        """The template's mark after an answer; where it has neither mark nor EOS, the words before a next question."""
        if self._template.eos:
            return Ends()
        mark = self._template.answer.partition("{output}")[2].strip()
        mark = mark or self._template.prompt.partition("{input}")[0].strip()
        number = self._tokenizer.control_id(mark)
        return Ends(texts=(mark,)) if number is None else Ends(ids=(number,))


class ModelPrompts(_Prompts):
    """Prompts as the model's own template writes them, with the ids that `transformers` gives them
    (`apply_chat_template(..., add_generation_prompt=True, sanitize_control_tokens=True)`).
    """

    def __init__(self, tokenizer: Tokenizer, text: str, path: Path, specials: Mapping[str, str | None]) -> None:
        super().__init__(tokenizer, path.name)
        controls = tokenizer.control_tokens()
        names = {number: word for word, number in controls.items()}
        known = {"bos_token": names.get(tokenizer.bos_id), "eos_token": names.get(tokenizer.eos_id), **specials}
        self._render = compile_template(text, path, {key: word for key, word in known.items() if word})
        words = "|".join(map(re.escape, sorted(controls, key=len, reverse=True))) or "(?!)"
        self._control, self._marked = re.compile(words), re.compile(f"{_MARK}({words}){_MARK}|{_MARK}")
        # Where the tokenizer puts a space before every text, the one that a template has there is that space.
        spaced = self._spaced and tokenizer.encode("a") != tokenizer.encode(" a")
        self._space = re.compile(f"(^|{words}) (?!$|{words})") if spaced else None

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """As `OwnPrompts.prompt`; which roles may follow one another is for the template to say (`DataError`)."""
        check_last(messages)
        written = self._render([{**message, "content": self._as_text(message["content"])} for message in messages])
        ids: list[int] = []
        for number, piece in enumerate(self._marked.split(written)):
            if piece:
                ids += self._encode(piece, inert=number % 2 == 1, inside=number > 0)
        return ids

    def _as_text(self, content: str) -> str:
        """The content with every control token's name between marks; its own marks go."""
        return self._control.sub(rf"{_MARK}\g<0>{_MARK}", content.replace(_MARK, ""))

    def _encode(self, piece: str, inert: bool, inside: bool) -> list[int]:
        """The ids of a piece, its control strings as text if `inert`. One from inside of a text is encoded behind a
        line's end, where no tokenizer adds a space, and loses that again.
        """
        encode = self._tokenizer.encode if inert else self._tokenizer.encode_with_controls
        text = "\n" + piece if inside else piece
        ids = encode(self._space.sub(r"\1", text) if self._space and not inert else text)
        end = self._tokenizer.encode("\n") if inside else []
        return ids[len(end):] if ids[:len(end)] == end else encode(piece)


def check_roles(messages: Sequence[Message]) -> None:
    """Raises `DataError` unless user and assistant alternate, a system text before any of the user's."""
    check_last(messages)
    before = "assistant"
    for number, message in enumerate(messages):
        role = message["role"]
        wanted = ("system", "user") if before == "assistant" else ("user",) if before == "system" else ("assistant",)
        if role not in wanted:
            raise DataError(f"messages[{number}] is of the role {role!r}, expected {' or '.join(wanted)}: questions of "
                            "the user and answers of the assistant alternate, and a system text stands before a "
                            "question.")
        before = role


def check_last(messages: Sequence[Message]) -> None:
    """Raises `DataError` unless there are messages, and the last one is to be answered."""
    if not messages or messages[-1]["role"] in ("system", "assistant"):
        found = f"{messages[-1]['role']}'s" if messages else "missing: there are no messages"
        raise DataError(f"the last message is {found}; expected one of the user's, which the model answers.")
