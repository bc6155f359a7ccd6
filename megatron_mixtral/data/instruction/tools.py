"""Calls of tools and their results, in the forms of OpenAI and sharegpt, to the JSON texts that a template writes.

The JSON is that of `mistral-common`'s v3 instruct tokenizer: keys in its order, arguments and results as values where
they are JSON and as strings where they are not, letters as they are.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mixtral.data.corpus import BadRecord

CALLING, ANSWERING = ("function_call", "tool_call", "tool_calls"), ("tool", "function", "observation", "ipython",
                                                                    "function_response", "tool_response")  # fmt: skip
_ID = re.compile("[a-zA-Z0-9]{9}")  # what mistral-common and the models' own templates take
_NAME = re.compile("[a-zA-Z0-9_-]{1,64}")


@dataclass(frozen=True)
class Call:
    """`arguments` is any JSON value, `id` is empty where the record has none."""

    name: str
    arguments: Any
    id: str


def read_calls(found: Any) -> tuple[Call, ...]:
    """The calls of a message: `tool_calls` or `function_call` of OpenAI's, or the value of sharegpt's `function_call`,
    a JSON text of one call or of a list.
    """
    calls = _parsed(found)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(one, dict) for one in calls):
        raise _bad(f"expected an object with name and arguments, or a list of such, found {str(found)[:60]!r}")
    return tuple(_call(one) for one in calls)


def write_calls(calls: tuple[Call, ...], ids: tuple[str, ...]) -> str:
    """The calls as the model writes them. An empty id is left out."""
    return _written([{"name": call.name, "arguments": call.arguments} | ({"id": one} if one else {})
                     for call, one in zip(calls, ids, strict=True)])  # fmt: skip


def write_result(content: Any, number: str) -> str:
    """What a tool answered to the call of that id."""
    return _written({"content": _parsed(content or "{}"), "call_id": number})


def ids_of(calls: tuple[Call, ...], place: int, answered: bool) -> tuple[str, ...]:
    """The id of each call: its own where it has nine letters and digits. Another, or a missing one of a call that is
    answered, is made of the call and its place in the dialogue: the same in every run, no two alike.
    """

    def made(call: Call, number: int) -> str:
        said = f"{place} {number} {call.name} {json.dumps(call.arguments)} {call.id}"
        return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:9]

    return tuple(call.id if _ID.fullmatch(call.id) else made(call, number) if call.id or answered else ""
                 for number, call in enumerate(calls))  # fmt: skip


def read_tools(record: Mapping[str, Any]) -> str:
    """The tools that a dialogue may call, as JSON; empty where there are none. `tools` of OpenAI, or a list of
    functions, or either as a text (LLaMA-Factory); `functions` (OpenAI's older form).
    """
    found = record.get("tools") or record.get("functions")
    tools = _parsed(found)
    if tools in (None, [], ""):
        return ""
    if not isinstance(tools, list) or not all(isinstance(one, dict) for one in tools):
        raise _bad(f"expected tools to be a list of objects, found {str(found)[:60]!r}")
    functions = [one["function"] if isinstance(one.get("function"), dict) else one for one in tools]
    return _written([{"type": "function", "function": {
        "name": _name(one), "description": one.get("description") or "", "parameters": one.get("parameters") or {}}}
        for one in functions])  # fmt: skip


def _call(found: Mapping[str, Any]) -> Call:
    function = found["function"] if isinstance(found.get("function"), dict) else found
    arguments = function.get("arguments", function.get("parameters"))
    number = found.get("id")
    if not isinstance(number, str | None):
        raise _bad(f"the id of a call is {str(number)[:40]!r}, not a string")
    return Call(_name(function), {} if arguments in (None, "") else _parsed(arguments),
                "" if number in (None, "null") else number)  # fmt: skip


def _name(function: Mapping[str, Any]) -> str:
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _bad(f"the name of a tool is {str(name)[:40]!r}; expected 1 to 64 letters, digits, _ or -")
    return name


def _parsed(value: Any) -> Any:
    """A text that is JSON as its value; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _written(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if re.search("[\ud800-\udfff]", text):
        raise BadRecord("lone_surrogate", f"half of a surrogate pair in a call or its result: {ascii(text[:40])}")
    return text


def _bad(what: str) -> BadRecord:
    return BadRecord("bad_tool_call", what)
