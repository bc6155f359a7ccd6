"""Lines of JSON to the texts of their keys, or to the reason why a line has none.

Three parsers, the next where one declines a line: our extension, which reads many lines at a time and nothing that is
in any way unusual; `orjson`, where it is installed; `json` of the standard library, which accepts the most (`NaN`,
halves of surrogate pairs) and says where an error is. So all give the same texts and the same errors.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from megatron_mixtral.tokenizer.engines.extensions import ExtensionMissing, load_extension

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment]

REASONS = ("bad_utf8", "bad_json", "not_an_object", "missing_key", "not_a_string", "lone_surrogate")

_fast_loads: Callable[[bytes], Any] | None = orjson.loads if orjson else None


class BadRecord(Exception):
    """A line or row that gives no document. `reason` is one of `REASONS`; the text says what is wrong, with a piece."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        assert reason in REASONS, reason
        self.reason = reason


@cache
def line_reader(keys: tuple[str, ...]) -> Any | None:
    """The `LineReader` of `native_json/`, which reads what is certain, or None where it is not built."""
    try:
        return load_extension("megatron_mixtral.data.corpus._native_json").LineReader(keys)
    except ExtensionMissing:
        return None


def parse_object(line: bytes) -> dict[str, Any]:
    """One line of JSON that holds an object. Raises `BadRecord` as `parse_record` does.

    Where `orjson` does not parse a line, integers come as floats and strings may hold halves of surrogate pairs.
    """
    try:
        record = _fast_loads(line) if _fast_loads else _loads(line)
    except ValueError:
        record = _loads(line)
    return _object(record, line)


def parse_record(line: bytes, keys: Sequence[str]) -> list[str]:
    """The texts of `keys` in one line of JSON.

    Raises `BadRecord` for bytes that are not UTF-8, bad JSON, a value that is no object, a missing key, a text that is
    not a string, and a string with half of a surrogate pair (which has no UTF-8 form). NaN, NUL (`\\u0000`) and unknown
    keys are fine; of a key that occurs twice the last counts.
    """
    try:
        record = _fast_loads(line) if _fast_loads else None
    except ValueError:
        record = None
    if record is not None:  # `orjson` takes no half of a pair: what it gives is Unicode
        try:
            texts = [record[key] for key in keys]
        except (KeyError, TypeError, IndexError):
            texts = []
        if texts and all(type(text) is str for text in texts):
            return texts
    return _slow_texts(line, keys)


def _slow_texts(line: bytes, keys: Sequence[str]) -> list[str]:
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
    return texts


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
        # Numbers are not used; as float one of any length is read, as orjson does.
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
