"""The forms in which instruction data come, each turned into the same canonical turns (`chat.Turn`).

A handler takes one JSON object and gives a `Dialogue`; what does not fit raises `BadRecord` with a reason to count by.
`detect` names the form of a record by its keys and texts.
"""

import difflib
import re
from collections.abc import Callable
from functools import partial

from megatron_mixtral.data.corpus import BadRecord
from megatron_mixtral.data.instruction.messages import (
    Dialogue,
    Message,
    Record,
    checked,
    from_messages,
    list_of,
    loss_of,
    text_of,
    to_turns,
)
from megatron_mixtral.tokenizer import chat


def alpaca(record: Record, ending: str = "") -> Dialogue:
    """`instruction`, `input` (may be missing or empty), `output`, all three with `ending`; optional `system`."""
    question, more = text_of(record, "instruction" + ending), text_of(record, "input" + ending, optional=True)
    answer = text_of(record, "output" + ending)
    if answer.strip() == "<nooutput>":
        raise BadRecord("no_answer", "the output is the marker <nooutput>")
    system = text_of(record, "system", optional=True)
    return checked([chat.Turn(f"{question}\n{more}" if more else question, answer, system)], _unread(record, ending))


def general_instruction(record: Record) -> Dialogue:
    """`instruction`, `input`, `output` joined as ModelLink does: a line for the input, even where it is empty."""
    question, more = text_of(record, "instruction"), text_of(record, "input", optional=True)
    return checked([chat.Turn(f"{question}\n{more}", text_of(record, "output"))], _unread(record, ""))


def _unread(record: Record, ending: str) -> dict[str, int]:
    """Files such as Alpaca_data_gpt4_zh.jsonl hold each sample in two languages, of which a handler reads one."""
    other = "" if ending else "_zh"
    return {f"output{other}_not_read": 1} if "output" + other in record else {}


_GUANACO = re.compile(r"###\s*(Human|Assistant):")


def oasst1(record: Record) -> Dialogue:
    """`text` with `### Human:` and `### Assistant:` before each message (openassistant-guanaco). `###` alone, as in
    Markdown, does not end a message.
    """
    first, *rest = _GUANACO.split(text_of(record, "text"))
    if first.strip() or not rest:
        raise BadRecord("unknown_form", f"the text does not begin with '### Human:' but with {first[:40]!r}")
    roles = {"Human": "user", "Assistant": "assistant"}
    return to_turns([Message(roles[role], text.strip()) for role, text in zip(rest[::2], rest[1::2], strict=True)])


def openai(record: Record) -> Dialogue:
    """`messages` of `role` (system, user, assistant, tool), `content` and, for answers, `loss` or `weight`; calls of
    tools in `tool_calls` or `function_call`, and the tools there are in `tools` or `functions`.
    """
    return from_messages(record, "messages")


def sharegpt(record: Record) -> Dialogue:
    """`conversations` of `from` (system, human, gpt, function_call, observation or tool) and `value`, or of `role` and
    `content`; optional `system` and `tools`.
    """
    return from_messages(record, "conversations")


_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("question", "response"),
          ("query", "response"), ("input", "output"))  # fmt: skip


def pair(record: Record) -> Dialogue:
    """A question and its answer under one of the pairs of keys in use (`_PAIRS`); optional `system_prompt` or `system`
    (OpenOrca: `system_prompt`, `question`, `response`).
    """
    found = _pair_of(record)
    if found is None:
        raise BadRecord("missing_key", "expected one of the pairs of keys " + ", ".join(map(" and ".join, _PAIRS)) +
                        f"; keys found: {', '.join(list(record)[:8]) or 'none'}")  # fmt: skip
    system = text_of(record, "system_prompt", optional=True) or text_of(record, "system", optional=True)
    return checked([chat.Turn(text_of(record, found[0]), text_of(record, found[1]), system, loss_of(record))])


def _pair_of(record: Record) -> tuple[str, str] | None:
    return next((names for names in _PAIRS if names[0] in record and names[1] in record), None)


def conversation(record: Record) -> Dialogue:
    """`conversation`: objects with `input`, `output`, optional `system`, `loss` and `weight` (XTuner's own form).

    As there, a first turn with an empty input and an output is plain text. Messages under that key are messages.
    """
    turns, said = [], list_of(record, "conversation")
    if "role" in said[0] or "from" in said[0]:
        return from_messages(record, "conversation")
    for one in said:
        question, answer = text_of(one, "input", optional=True), text_of(one, "output")
        turns.append(chat.Turn(question or None, answer, text_of(one, "system", optional=True), loss_of(one)))
    return checked(turns)


def pretrain(record: Record) -> Dialogue:
    """`text`: plain text, all of it trained."""
    return checked([chat.Turn(None, text_of(record, "text"))])


HANDLERS: dict[str, Callable[[Record], Dialogue]] = {
    "alpaca": alpaca,
    "alpaca_zh": partial(alpaca, ending="_zh"),
    "oasst1": oasst1,
    "openai": openai,
    "sharegpt": sharegpt,
    "conversation": conversation,
    "pair": pair,
    "pretrain": pretrain,
    "GeneralInstructionHandler": general_instruction,
}


_SIGNS = {  # the keys by which a record's form is known
    "conversation": ("conversation",), "openai": ("messages",), "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"), "alpaca_zh": ("instruction_zh", "output_zh"),
}  # fmt: skip


def detect(record: Record) -> str:
    """The name of the handler that fits a record. `BadRecord` ("unknown_form") where none does.

    A record with both `instruction` and `instruction_zh` is `alpaca`: the language is a choice, made by name.
    """
    for name, signs in _SIGNS.items():
        if all(key in record for key in signs) and (len(signs) > 1 or isinstance(record[signs[0]], list)):
            return name
    if _pair_of(record):
        return "pair"
    if isinstance(record.get("text"), str):
        return "oasst1" if _GUANACO.match(record["text"].lstrip()) else "pretrain"
    name, keys = _nearest(record)
    raise BadRecord("unknown_form", "no known form of instruction data has the keys "
                    f"{', '.join(list(record)[:8]) or '(none)'}; the nearest is {name}, which has {' and '.join(keys)}")


def _nearest(record: Record) -> tuple[str, tuple[str, ...]]:
    """The form whose keys are spelt most like the record's, and these keys."""

    def likeness(keys: tuple[str, ...]) -> float:
        alike = (max((difflib.SequenceMatcher(None, key, str(found).lower()).ratio() for found in record), default=0.0)
                 for key in keys)
        return sum(alike) / len(keys)

    forms = [*_SIGNS.items(), *(("pair", names) for names in _PAIRS), ("pretrain", ("text",))]
    return max(forms, key=lambda form: likeness(form[1]))
