"""The forms in which instruction data come, each turned into the same canonical turns (`chat.Turn`).

A handler takes one JSON object and gives a `Dialogue`; what does not fit raises `BadRecord` with a reason to count by.
`detect` names the form of a record by its keys and texts.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron_mixtral.data.corpus import BadRecord
from megatron_mixtral.tokenizer import chat


@dataclass
class Dialogue:
    """The turns of a record. `left_out` counts messages that have no place in them, by what they are."""

    turns: list[chat.Turn]
    left_out: dict[str, int] = field(default_factory=dict)


Record = Mapping[str, Any]


def alpaca(record: Record, ending: str = "") -> Dialogue:
    """`instruction`, `input` (may be missing or empty), `output`, all three with `ending`; optional `system`."""
    question, more = _text(record, "instruction" + ending), _text(record, "input" + ending, optional=True)
    answer = _text(record, "output" + ending)
    if answer.strip() == "<nooutput>":
        raise BadRecord("no_answer", "the output is the marker <nooutput>")
    system = _text(record, "system", optional=True)
    return _checked([chat.Turn(f"{question}\n{more}" if more else question, answer, system)], _unread(record, ending))


def general_instruction(record: Record) -> Dialogue:
    """`instruction`, `input`, `output` joined as ModelLink does: a line for the input, even where it is empty."""
    question, more = _text(record, "instruction"), _text(record, "input", optional=True)
    return _checked([chat.Turn(f"{question}\n{more}", _text(record, "output"))], _unread(record, ""))


def _unread(record: Record, ending: str) -> dict[str, int]:
    """Files such as Alpaca_data_gpt4_zh.jsonl hold each sample in two languages, of which a handler reads one."""
    other = "" if ending else "_zh"
    return {f"output{other}_not_read": 1} if "output" + other in record else {}


_GUANACO = re.compile(r"###\s*(Human|Assistant):")


def oasst1(record: Record) -> Dialogue:
    """`text` with `### Human:` and `### Assistant:` before each message (openassistant-guanaco). `###` alone, as in
    Markdown, does not end a message.
    """
    first, *rest = _GUANACO.split(_text(record, "text"))
    if first.strip() or not rest:
        raise BadRecord("unknown_form", f"the text does not begin with '### Human:' but with {first[:40]!r}")
    roles = {"Human": "user", "Assistant": "assistant"}
    return _to_turns([(roles[role], text.strip(), True) for role, text in zip(rest[::2], rest[1::2], strict=True)])


def openai(record: Record) -> Dialogue:
    """`messages` of `role` (system, user, assistant), `content` and, for answers, `loss` or `weight`."""
    return _from_messages(record, "messages")


def sharegpt(record: Record) -> Dialogue:
    """`conversations` of `from` (system, human, gpt) and `value`, or of `role` and `content`; optional `system`."""
    return _from_messages(record, "conversations")


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
    system = _text(record, "system_prompt", optional=True) or _text(record, "system", optional=True)
    return _checked([chat.Turn(_text(record, found[0]), _text(record, found[1]), system, _loss(record))])


def _pair_of(record: Record) -> tuple[str, str] | None:
    return next((names for names in _PAIRS if names[0] in record and names[1] in record), None)


def conversation(record: Record) -> Dialogue:
    """`conversation`: objects with `input`, `output`, optional `system`, `loss` and `weight` (XTuner's own form).

    As there, a first turn with an empty input and an output is plain text. Messages under that key are messages.
    """
    turns, said = [], _list(record, "conversation")
    if "role" in said[0] or "from" in said[0]:
        return _from_messages(record, "conversation")
    for one in said:
        question, answer = _text(one, "input", optional=True), _text(one, "output")
        turns.append(chat.Turn(question or None, answer, _text(one, "system", optional=True), _loss(one)))
    return _checked(turns)


def pretrain(record: Record) -> Dialogue:
    """`text`: plain text, all of it trained."""
    return _checked([chat.Turn(None, _text(record, "text"))])


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


# -- the parts --------------------------------------------------------------------------------------------

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_TOOLS = ("tool", "function", "function_call", "function_response", "observation", "ipython")


def _from_messages(record: Record, key: str) -> Dialogue:
    """The messages of a record, with a `system` text beside them."""
    messages = [_message(one) for one in _list(record, key)]
    system = _text(record, "system", optional=True)
    return _to_turns([("system", system, True), *messages] if system else messages)


def _to_turns(messages: list[tuple[str, str, bool]]) -> Dialogue:
    """(role, text, loss) in order. Neighbours of one role are one text, a blank line between them, as mistral-common
    joins them. Answers before the first question and a last question without an answer have no place in a turn and are
    counted; a system text belongs to the question after it.
    """
    turns: list[chat.Turn] = []
    left_out: Counter[str] = Counter()
    system, question = "", None
    for role, text, loss in _joined(messages):
        if role == "system" and question is None:
            system = text
        elif role == "user":
            question = text
        elif role == "assistant" and question is not None:
            turns.append(chat.Turn(question, text, system, loss))
            system, question = "", None
        elif role == "assistant" and not turns:
            left_out["answer_without_question"] += 1
        else:
            raise BadRecord("roles_out_of_order", f"a message of {role} where none can be: {text[:40]!r}")
    for name, text in (("question_without_answer", question), ("system_without_question", question is None and system)):
        if text:
            left_out[name] = 1
    return _checked(turns, left_out)


def _joined(messages: list[tuple[str, str, bool]]) -> list[tuple[str, str, bool]]:
    joined: list[tuple[str, str, bool]] = []
    for role, text, loss in messages:
        if not joined or joined[-1][0] != role:
            joined.append((role, text, loss))
            continue
        if joined[-1][2] != loss:
            raise BadRecord("roles_out_of_order", f"two messages of {role} behind one another are one answer, of which "
                            f"one part has loss false or weight 0 and the other has not: {text[:40]!r}")
        joined[-1] = (role, f"{joined[-1][1]}\n\n{text}", loss)
    return joined


def _checked(turns: list[chat.Turn], left_out: dict[str, int] | None = None) -> Dialogue:
    """`BadRecord` unless there is an answer to train, and every answer that is trained has text."""
    if not turns:
        raise BadRecord("no_answer", "no question with an answer")
    if not any(turn.loss for turn in turns):
        raise BadRecord("no_trained_answer", "every answer has loss false or weight 0")
    if any(turn.loss and not (turn.output or "").strip() for turn in turns):
        raise BadRecord("no_answer", "an answer without text")
    return Dialogue(turns, left_out or {})


def _message(record: Record) -> tuple[str, str, bool]:
    """(role, text, loss) of one message; a list of content parts gives their joined texts."""
    role_key, text_key = ("from", "value") if "from" in record else ("role", "content")
    found = str(record.get(role_key))[:40]
    if found in _TOOLS or record.get("tool_calls") or record.get("function_call"):
        raise BadRecord("tool_message", f"a message of {found!r} calls a tool or answers for one, which no template "
                        "here writes: leave such records out (--on-error skip)")
    if found not in _ROLES:
        raise BadRecord("unknown_role", f"the {role_key} of a message is {found!r}; known: {', '.join(_ROLES)}")
    role, content = _ROLES[found], record.get(text_key)
    loss = role != "assistant" or _loss(record)
    if isinstance(content, list) and all(isinstance(one, dict) and one.get("type") == "text" for one in content):
        return role, "\n\n".join(_text(one, "text") for one in content), loss
    return role, _text(record, text_key), loss


def _loss(record: Record) -> bool:
    """Whether an answer is trained: `loss` is true (a boolean, 0 or 1, or such a word) and `weight` is 1 (of OpenAI and
    mistral-finetune: 0 or 1). Absent or null means that it is.
    """
    weight, found = record.get("weight"), record.get("loss")
    if weight not in (None, 0, 1):
        raise BadRecord("bad_weight", f"weight is {weight!r}; expected 0 (not trained) or 1 (trained)")
    word = found.strip().lower() if isinstance(found, str) else found
    if word is None or word in ("true", "1", True):  # 1 and 1.0 too
        return weight != 0
    if word in ("false", "0", False):
        return False
    raise BadRecord("bad_loss_flag", f"loss is {found!r}; expected true or false")


def _list(record: Record, key: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        raise BadRecord("missing_key", f"expected {key!r} to be a list of objects, found {str(value)[:40]!r}")
    return value


_HALF_PAIR = re.compile("[\ud800-\udfff]")


def _text(record: Record, key: str, optional: bool = False) -> str:
    value = record.get(key)
    if value is None and optional:
        return ""
    if key not in record:
        raise BadRecord("missing_key", f"no key {key!r}; keys found: {', '.join(list(record)[:8]) or 'none'}")
    if not isinstance(value, str):
        raise BadRecord("not_a_string", f"the value of {key!r} is {str(value)[:40]!r}, not a string")
    if _HALF_PAIR.search(value):
        raise BadRecord("lone_surrogate", f"half of a surrogate pair in the value of {key!r}: {ascii(value[:40])}")
    return value
