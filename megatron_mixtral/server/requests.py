"""The body of a request to what it asks for, or to a sentence about what is wrong with it.

The fields are OpenAI's, and a few that other servers of open models have too (`top_k`, `repetition_penalty`,
`stop_token_ids`, `ignore_eos`). What is not supported is refused, unless its value asks for nothing: an answer that
silently leaves out a part of the question is a wrong one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from megatron_mixtral.errors import MixtralError
from megatron_mixtral.inference import SamplingParams

DEFAULT_MAX_TOKENS = 16  # of a completion, as OpenAI's; a chat's answer ends with the context
MOST_STOPS, MOST_PROMPTS = 16, 128

_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "seed", "n", "stop", "stop_token_ids", "ignore_eos",
             "max_tokens")
_COMMON = ("model", "stream", "stream_options", *_SAMPLING)
_FIELDS = {"completion": ("prompt", "logprobs", *_COMMON),
           "chat": ("messages", "logprobs", "top_logprobs", "max_completion_tokens", *_COMMON)}
# Fields that do not change a text, and values by which nothing is asked for.
_NOTES = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "echo": (False,),
    "suffix": ("",), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "min_p": (0,),
    "min_tokens": (0,), "response_format": ({"type": "text"},), "modalities": (["text"],),
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Refused(MixtralError):
    """An answer that is an error: `status` of HTTP, a sentence, and OpenAI's `param` and `code`."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """OpenAI's object of an error."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Asked:
    """What a body asks for. A chat has `messages`, a completion `prompts`, each a text or ids."""

    model: str
    params: SamplingParams
    stream: bool
    usage: bool  # whether a stream ends with the counts of tokens
    prompts: Sequence[str | list[int]] = ()
    messages: Sequence[Mapping[str, str]] = ()

    @property
    def characters(self) -> int:
        """Of all texts that have to be encoded."""
        texts = [one for one in self.prompts if isinstance(one, str)] + [one["content"] for one in self.messages]
        return sum(map(len, texts))


def parse(kind: str, body: bytes, models: Sequence[str]) -> Asked:
    """`kind` is "chat" or "completion", `models` are the names that may be asked for, the first where none is. Raises
    `Refused`, and the `ConfigError` of `SamplingParams`.
    """
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeError, ValueError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise Refused(400, f"the body is {_said(fields)}, expected an object with {', '.join(_FIELDS[kind][:2])}, ...")
    fields = {name: value for name, value in fields.items() if value is not None}
    _check_names(kind, fields)
    model = fields.get("model", models[0])
    if model not in models:
        raise unknown(model, models)
    options = _of_type(fields, "stream_options", dict, {})
    if set(options) - {"include_usage", "include_obfuscation"}:
        raise Refused(400, f"stream_options is {_said(options)}, expected an object with include_usage: true",
                      "stream_options")
    content = ({"messages": _messages(fields.get("messages"))} if kind == "chat"
               else {"prompts": _prompts(fields.get("prompt"))})
    return Asked(model, SamplingParams(**_sampling(kind, fields)), _of_type(fields, "stream", bool, False),
                 options.get("include_usage") is True, **content)


def unknown(model: Any, models: Sequence[str]) -> Refused:
    """The answer for a model that is not here."""
    there = f"{models[0]!r} alone" if len(models) == 1 else " and ".join(map(repr, models))
    return Refused(404, f"the model {_said(model)} is not here; this server has {there}", "model", "model_not_found")


def _said(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _of_type(fields: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = fields.get(name, default)
    if not isinstance(value, kind):
        words = {bool: "true or false", dict: "an object", list: "a list", str: "a text"}
        raise Refused(400, f"{name} is {_said(value)}, expected {words[kind]}", name)
    return value


def _check_names(kind: str, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name in _FIELDS[kind] or name in _NOTES:
            continue
        if name in ("chat_template", "chat_template_kwargs"):
            raise Refused(400, f"{name} is not taken from a request: the template is the model's, or --prompt-template "
                               "of the server", name)
        if name not in _NEUTRAL:
            raise Refused(400, f"the field {_said(name)} is not known; known are {', '.join(_FIELDS[kind])}", name)
        if value not in _NEUTRAL[name] or isinstance(value, bool) != isinstance(_NEUTRAL[name][0], bool):
            raise Refused(400, f"{name} is {_said(value)}, which this server does not support: leave it out", name)


def _sampling(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `SamplingParams`. OpenAI's default temperature is 1, ours 0."""
    found = {"temperature": 1.0, "max_tokens": DEFAULT_MAX_TOKENS if kind == "completion" else None}
    found |= {name: fields[name] for name in _SAMPLING if name in fields}
    _of_type(found, "ignore_eos", bool, False)
    if isinstance(found.get("stop"), str):
        found["stop"] = [found["stop"]]
    for name in ("stop", "stop_token_ids"):
        if len(_of_type(found, name, list, [])) > MOST_STOPS:
            raise Refused(400, f"{name} has {len(found[name])} entries, at most {MOST_STOPS}", name)
    if kind == "completion":
        return found | {"logprobs": fields.get("logprobs")}
    if "max_completion_tokens" in fields:
        if fields.get("max_tokens", fields["max_completion_tokens"]) != fields["max_completion_tokens"]:
            raise Refused(400, f"max_tokens is {_said(fields['max_tokens'])} and max_completion_tokens "
                               f"{_said(fields['max_completion_tokens'])}: give one of them", "max_tokens")
        found["max_tokens"] = fields["max_completion_tokens"]
    if "top_logprobs" in fields and not fields.get("logprobs"):
        raise Refused(400, "top_logprobs needs logprobs: true", "top_logprobs")
    return found | {"logprobs": fields.get("top_logprobs", 0) if _of_type(fields, "logprobs", bool, False) else None}


def _prompts(prompt: Any) -> Sequence[str | list[int]]:
    """One text or several, or ids of one prompt or of several."""
    several = isinstance(prompt, list) and prompt and not _are_ids(prompt)
    found = prompt if several else [prompt]
    if len(found) > MOST_PROMPTS:
        raise Refused(400, f"prompt has {len(found)} entries, at most {MOST_PROMPTS}", "prompt")
    for one in found:
        if isinstance(one, str):
            _check_text(one, "prompt")
        elif not (isinstance(one, list) and one and _are_ids(one)):
            raise Refused(400, f"prompt is {_said(prompt)}, expected a text, the ids of its tokens, or a list of "
                               "either", "prompt")
    return found


def _are_ids(values: list[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def _messages(messages: Any) -> list[dict[str, str]]:
    """The messages with a role and a content each; a content in parts is joined."""
    if not isinstance(messages, list) or not messages:
        raise Refused(400, f"messages is {_said(messages)}, expected a list such as "
                           '[{"role": "user", "content": "Hello"}]', "messages")
    found = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise Refused(400, f"{where} is {_said(message)}, expected an object with a role and a content", where)
        if message.get("tool_calls") or message.get("function_call"):
            raise Refused(400, f"{where} calls tools, which this server does not support", where)
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise Refused(400, f"{where}.role is {_said(role)}, expected {', '.join(_ROLES)}", where)
        found.append({"role": _ROLES[role], "content": _content(message.get("content"), where)})
    return found


def _content(content: Any, where: str) -> str:
    if isinstance(content, list) and content:
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) == len(content) and all(isinstance(part, str) for part in parts):
            content = "".join(parts)
    if not isinstance(content, str):
        raise Refused(400, f"{where}.content is {_said(content)}, expected a text, or parts of the type text", where)
    _check_text(content, where)
    return content


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(400, f"{where} has half of a surrogate pair at {error.start}, which is no character",
                      where) from error
