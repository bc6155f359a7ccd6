"""Lines of JSON to the texts of their keys, or to the reason why a line has none.

`msgspec` reads a line; where it declines, `json` of the standard library does, which accepts more (`NaN`, halves of
surrogate pairs) and says where an error is. So every line has the texts, or the error, of the standard library.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import msgspec

REASONS = ("bad_utf8", "bad_json", "not_an_object", "missing_key", "not_a_string", "lone_surrogate")  # of lines


class BadRecord(Exception):
    """A line, row or dialogue that gives nothing. `reason` is a word to count by; the text says what is wrong."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def parse_object(line: bytes) -> dict[str, Any]:
    """One line of JSON that holds an object. Raises `BadRecord` as `parse_record` does.

    Where `msgspec` does not parse a line, integers come as floats and strings may hold halves of surrogate pairs.
    """
    try:
        record = msgspec.json.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        record = _loads(line)
    return _object(record, line)


def parse_record(line: bytes, keys: tuple[str, ...]) -> tuple[str, ...]:
    """The texts of `keys` in one line of JSON.

    Raises `BadRecord` for bytes that are not UTF-8, bad JSON, a value that is no object, a missing key, a text that is
    not a string, and a string with half of a surrogate pair (which has no UTF-8 form). NaN, NUL (`\\u0000`) and unknown
    keys are fine; of a key that occurs twice the last counts.
    """
    try:
        texts = msgspec.structs.astuple(_decoder(keys)(line))
        if not line.isascii():
            line.decode("utf-8")  # `msgspec` does not look inside the values that are not asked for
        return texts
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _slow_texts(line, keys)


@cache
def _decoder(keys: tuple[str, ...]) -> Callable[[bytes], Any]:
    """A function from a line to the strings of `keys`. Raises `ValueError` for a key with a quote or a backslash."""
    names = {f"key_{number}": key for number, key in enumerate(keys)}
    return msgspec.json.Decoder(msgspec.defstruct("Texts", [(name, str) for name in names], rename=names)).decode


def _slow_texts(line: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    """The texts by way of the standard library, which also finds what is wrong and where."""
    record = _object(_loads(line), line)
    texts = []
    for key in keys:
        if key not in record:
            found = ascii(", ".join(list(record)[:8]))[1:-1][:200] or "none"
            raise BadRecord("missing_key", f"no key {key!r}; keys found: {found} (choose with --json-keys)")
        value = record[key]
        if not isinstance(value, str):
            raise BadRecord("not_a_string", f"the value of {key!r} is {_kind(value)}, not a string: {_piece(line)}")
        # Half a pair can only come from an escape, since the bytes were UTF-8; most documents need no second look.
        if b"\\u" in line and (half := re.search("[\ud800-\udfff]", value)):
            shown = ascii(value[max(half.start() - 20, 0) : half.start() + 20])
            raise BadRecord("lone_surrogate", f"half of a surrogate pair in the value of {key!r}, near {shown}")
        texts.append(value)
    return tuple(texts)


def _object(record: object, line: bytes) -> dict[str, Any]:
    if not isinstance(record, dict):
        hint = " (a JSON array of records: write one record per line)" if isinstance(record, list) else ""
        raise BadRecord("not_an_object", f"expected an object, found {_kind(record)}{hint}: {_piece(line)}")
    return record


def _loads(line: bytes) -> object:
    """By the standard library; raises `BadRecord` with the place of the error."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        piece = line[max(error.start - 20, 0) : error.start + 20]
        raise BadRecord("bad_utf8", f"byte {error.start + 1} of the line is not UTF-8, near {piece!r}") from error
    try:
        # Numbers are not used; as float one of any length is read.
        return json.loads(text, parse_int=float)
    except json.JSONDecodeError as error:
        place = len(text[: error.pos].encode("utf-8"))
        raise BadRecord("bad_json", f"{error.msg} at column {error.pos + 1}, near {_piece(line, place)}") from error
    except (ValueError, RecursionError) as error:
        raise BadRecord("bad_json", f"{error}, in {_piece(line)}") from error


def _piece(line: bytes, position: int = 0) -> str:
    """About 60 characters around byte `position`."""
    start = max(position - 30, 0)
    return ascii(line[start : start + 60].decode("utf-8", "replace").rstrip("\r\n"))


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
