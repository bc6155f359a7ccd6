"""Messages of roles to turns, whichever form they came in, and the parts of a record that all forms read."""

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_mixtral.data.corpus import BadRecord
from megatron_mixtral.data.instruction.tools import (
    ANSWERING,
    CALLING,
    Call,
    ids_of,
    read_calls,
    read_tools,
    write_calls,
    write_result,
)
from megatron_mixtral.tokenizer import chat

Record = Mapping[str, Any]

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
          **dict.fromkeys(CALLING, "assistant"), **dict.fromkeys(ANSWERING, "tool")}  # fmt: skip


@dataclass
class Dialogue:
    """The turns of a record. `left_out` counts messages that have no place in them, by what they are."""

    turns: list[chat.Turn]
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    """What one of the roles system, user, assistant and tool says. `calls` are an answer's in place of text, `answers`
    is the id of the call that a tool answers (empty where the record has none).
    """

    role: str
    text: str
    loss: bool = True
    calls: tuple[Call, ...] = ()
    answers: str = ""


def from_messages(record: Record, key: str) -> Dialogue:
    """The messages of a record, with a `system` text and the tools beside them."""
    messages = [_message(one) for one in list_of(record, key)]
    system = text_of(record, "system", optional=True)
    return to_turns([Message("system", system), *messages] if system else messages, read_tools(record))


def to_turns(messages: Sequence[Message], tools: str = "") -> Dialogue:
    """Messages in order. Neighbours of one role are one text, a blank line between them, as mistral-common joins them;
    the results of tools are what the answer after them answers. A system text belongs to the question after it. Answers
    before the first question, and a last question or result without an answer, have no place in a turn: counted.
    """
    turns: list[chat.Turn] = []
    left_out: Counter[str] = Counter()
    system, question = "", None
    results: tuple[str, ...] = ()
    owed: list[tuple[str, str]] = []  # of calls without a result: the id in the record, the id that is written
    said = _joined(messages)
    for place, message in enumerate(said):
        role, text = message.role, message.text
        if role == "system" and question is None and not results:
            system = text
        elif role == "user" and not results:
            question, owed = text, []
        elif role == "tool" and owed:
            results += (write_result(text, _taken(owed, message.answers)),)
        elif role == "assistant" and (question is not None or results) and not (results and owed):
            answered = place + 1 < len(said) and said[place + 1].role == "tool"
            ids = ids_of(message.calls, place, answered)
            owed = [(call.id, one) for call, one in zip(message.calls, ids, strict=True)]
            turns.append(chat.Turn(question or "", write_calls(message.calls, ids) if ids else text, system,
                                   message.loss, tools if not turns else "", results, bool(ids)))  # fmt: skip
            system, question, results = "", None, ()
        elif role == "assistant" and not turns:
            left_out["answer_without_question"] += 1
        else:
            raise _out_of_order(message, bool(results and owed))
    for name, there in (("question_without_answer", question), ("result_without_answer", results),
                        ("system_without_question", question is None and system)):  # fmt: skip
        if there:
            left_out[name] = 1
    return checked(turns, left_out)


def _out_of_order(message: Message, owed: bool) -> BadRecord:
    why = ""
    if message.role == "tool":
        why = "; no call before it waits for a result (calls are messages of function_call, or tool_calls in one)"
    elif owed:
        why = "; a call before it has no result yet"
    return BadRecord("roles_out_of_order", f"a message of {message.role} where none can be: {message.text[:40]!r}{why}")


def _taken(owed: list[tuple[str, str]], wanted: str) -> str:
    """The written id of the call that a result answers, which is then no longer owed one: the call of its id, or the
    first one where it names none.
    """
    for number, (theirs, ours) in enumerate(owed):
        if not wanted or wanted == theirs:
            del owed[number]
            return ours
    raise BadRecord("bad_tool_call", f"a result answers the call {wanted[:40]!r}; those without a result are "
                    f"{', '.join(repr(theirs) for theirs, _ in owed)}")


def _joined(messages: Sequence[Message]) -> list[Message]:
    joined: list[Message] = []
    for message in messages:
        if not joined or joined[-1].role != message.role or message.role == "tool":
            joined.append(message)
            continue
        last = joined[-1]
        if last.loss != message.loss:
            raise BadRecord("roles_out_of_order", f"two messages of {message.role} behind one another are one answer, "
                            "of which one part has loss false or weight 0 and the other has not: "
                            f"{message.text[:40]!r}")
        if bool(last.calls) != bool(message.calls):
            raise _text_beside_calls(last.text or message.text)
        text = "" if last.calls else f"{last.text}\n\n{message.text}"
        joined[-1] = replace(last, text=text, calls=last.calls + message.calls)
    return joined


def _text_beside_calls(text: str) -> BadRecord:
    return BadRecord("text_beside_calls", f"an answer has both text and calls of tools, which Mixtral's format cannot "
                     f"write: {text[:40]!r}")


def _message(record: Record) -> Message:
    """One message; a list of content parts gives their joined texts."""
    role_key, text_key = ("from", "value") if "from" in record else ("role", "content")
    found = str(record.get(role_key))[:40]
    role = _ROLES.get(found)
    if role is None:
        near = difflib.get_close_matches(found.lower(), _ROLES, 1, 0.5)
        raise BadRecord("unknown_role", f"the {role_key} of a message is {found!r}; known: {', '.join(_ROLES)}"
                        + (f"; the nearest is {near[0]}" if near else ""))
    loss = role != "assistant" or loss_of(record)
    if found in CALLING:
        return Message(role, "", loss, read_calls(record.get(text_key)))
    said = (record.get("tool_calls") or record.get("function_call")) if role == "assistant" else None
    calls = read_calls(said) if said else ()
    text = "" if calls and record.get(text_key) is None else _content(record, text_key)
    if calls and text.strip():
        raise _text_beside_calls(text)
    return Message(role, text, loss, calls, text_of(record, "tool_call_id", optional=True) if role == "tool" else "")


def _content(record: Record, key: str) -> str:
    content = record.get(key)
    if isinstance(content, list) and all(isinstance(one, dict) and one.get("type") == "text" for one in content):
        return "\n\n".join(text_of(one, "text") for one in content)
    return text_of(record, key)


# -- parts of a record -------------------------------------------------------------------------------------


def checked(turns: list[chat.Turn], left_out: dict[str, int] | None = None) -> Dialogue:
    """`BadRecord` unless there is an answer to train, and every answer that is trained has text."""
    if not turns:
        raise BadRecord("no_answer", "no question with an answer")
    if not any(turn.loss for turn in turns):
        raise BadRecord("no_trained_answer", "every answer has loss false or weight 0")
    if any(turn.loss and not (turn.output or "").strip() for turn in turns):
        raise BadRecord("no_answer", "an answer without text")
    return Dialogue(turns, left_out or {})


def loss_of(record: Record) -> bool:
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


def list_of(record: Record, key: str) -> list[Any]:
    """The objects of a list. `BadRecord` where there is no list, or anything else in it."""
    value = record.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        raise BadRecord("missing_key", f"expected {key!r} to be a list of objects, found {str(value)[:40]!r}")
    return value


_HALF_PAIR = re.compile("[\ud800-\udfff]")


def text_of(record: Record, key: str, optional: bool = False) -> str:
    """The text of a key; "" where it is missing or null and may be. `BadRecord` for anything that is no text."""
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
