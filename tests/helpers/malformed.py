"""Bodies that no client should send, drawn from a seed: cut, mixed up, of wrong types, too deep, too large."""

import json
import random
from collections.abc import Iterator
from typing import Any

SOUND = {
    "/v1/completions": {"model": "tiny", "prompt": "Hello", "max_tokens": 2, "temperature": 0.5, "n": 1, "stop": ["x"],
                        "seed": 1, "logprobs": 1, "stream": False, "top_p": 0.9},
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2,
                             "temperature": 0.5, "stream": True, "top_logprobs": 2, "logprobs": True, "stop": "x"},
}
ODD: list[Any] = [None, True, False, 0, -1, 1.5, 2**31, 2**63, 2**64, -2**70, 10**400, 1e308, -1e308, "", "x", "\0",
                  "1", "\U0001f600" * 50, "x" * 3000, [], {}, [[]], [None], [{}], ["x", 1], [1, "x"], [1.5], {"a": 1},
                  [-1], [2**40], [True], [0] * 500, [{"role": "user"}], [{"role": "god", "content": "x"}],
                  [{"role": "user", "content": [{"type": "image_url"}]}], [{"role": "assistant", "content": "x"}],
                  [{"role": "user", "content": "x", "tool_calls": [1]}], {"include_usage": 1}, {"x": {}}]  # fmt: skip
FIELDS = ["model", "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "n",
          "stop", "seed", "logprobs", "top_logprobs", "stream", "stream_options", "max_completion_tokens",
          "stop_token_ids", "ignore_eos", "chat_template", "tools", "best_of", "logit_bias", "response_format",
          "echo", "nonsense", ""]
RAW = [b"", b"{", b"null", b"[]", b'"x"', b"1", b"NaN", b'{"temperature": NaN}', b"\xff\xfe", b'{"prompt": "\xff"}',
       b'{"prompt": "\\ud800"}', b'{"messages": [{"role": "user", "content": "\\udfff"}]}', b"[" * 100_000,
       b'{"a":' * 50_000, b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}", b"\0" * 100, b"{}", b'{"prompt": "x"',
       b'{"max_tokens": 1e999, "prompt": "x"}', b"x" * (2**20 + 1),
       b'{"prompt": "' + b"a" * 200_000 + b'"}']  # fmt: skip


LARGEST = [(path, body, "application/json") for path in SOUND for body in RAW] + [
    ("/v1/completions", b'{"prompt": "' + b"a" * (2**20 - 20) + b'"}', "application/json")]  # what takes most memory


def malformed(count: int, seed: int = 0) -> Iterator[tuple[str, bytes, str]]:
    """`count` times (path, body, content type); a few of them may be sound by chance."""
    chance = random.Random(seed)
    for number in range(count):
        path = chance.choice(list(SOUND))
        kind = "application/json"
        if number < len(RAW):
            yield path, RAW[number], kind
            continue
        body = dict(SOUND[path])
        for _ in range(chance.randint(1, 3)):
            body[chance.choice(FIELDS)] = chance.choice(ODD)
        raw = json.dumps(body).encode()
        way = chance.random()
        if way < 0.1:
            raw = raw[:chance.randrange(len(raw))]
        elif way < 0.2:
            place = chance.randrange(len(raw))
            raw = raw[:place] + bytes([chance.randrange(256)]) + raw[place + 1:]
        elif way < 0.25:
            kind = chance.choice(["", "text/plain", "multipart/form-data", "application/x-www-form-urlencoded"])
        yield path, raw, kind
