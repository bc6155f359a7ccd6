"""The server as OpenAI's own client sees it, on an engine without a model: the same routes, threads and sockets."""

import json
import socket
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from helpers.events import until
from helpers.fake_engine import WORDS, fake_generator
from helpers.malformed import malformed
from helpers.serving import post, serving, tokenizer_and_prompts

from megatron_mixtral.errors import ConfigError
from megatron_mixtral.server.settings import Settings

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tokenizer_and_prompts(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(parts):
    with serving(fake_generator(parts[0]), parts[1]) as found:
        yield found


@pytest.fixture
def held(server):
    """The server, whose engine stands still until the test lets it go."""
    server.engine.gate.clear()
    yield server
    server.engine.gate.set()


@pytest.fixture(autouse=True)
def nothing_is_left(server):
    yield
    server.engine.gate.set()
    until(lambda: not server.engine.has_work and not server.desk._open, "a slot was not given back")


def test_models(server):
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny' alone"):
        client.models.retrieve("gpt-9")
    with pytest.raises(openai.NotFoundError, match="model 'gpt-9' is not here"):
        client.completions.create(model="gpt-9", prompt="x")


def test_a_model_and_its_adapters(parts):
    """Two names; what is asked for decides whether the engine takes the adapters."""
    with serving(fake_generator(parts[0]), parts[1], adapter="tuned") as both:
        asked, add = [], both.engine.add
        both.engine.add = lambda name, ids, params: (asked.append(params.adapter), add(name, ids, params))
        client = both.client()
        assert [model.id for model in client.models.list()] == ["tiny", "tuned"]
        for name in ("tiny", "tuned"):
            answer = client.chat.completions.create(model=name, messages=HELLO, max_tokens=2)
            assert answer.model == name == client.models.retrieve(name).id
        status, answer = post(both, "/v1/completions", {"prompt": "x", "max_tokens": 2})
        assert (status, answer["model"], asked) == (200, "tiny", [False, True, False])
        with pytest.raises(openai.NotFoundError, match="is not here; this server has 'tiny' and 'tuned'"):
            client.completions.create(model="gpt-9", prompt="x")
    with pytest.raises(ConfigError, match="are both called 'one': give another --served-adapter-name"):
        Settings(model="one", adapter="one")
    for wrong in ("", " ", "two words", "line\n", "a\tb", "\x1b[0m", "\u202eright", "\u00a0", "\udcff"):
        for field, flag in (("model", "--served-model-name"), ("adapter", "--served-adapter-name")):
            with pytest.raises(ConfigError, match=f"{flag} .* can be asked for: expected .* without spaces"):
                Settings(**{"model": "one", field: wrong})
    assert Settings(model="mistralai/Mixtral-8x7B:v0.1", adapter="\u6a21\u578b_\u00fc+1").names[1:]


def test_a_completion(server, parts):
    asked = {"model": "tiny", "prompt": "Hello", "max_tokens": 7, "seed": 3, "logprobs": 2}
    answer = server.client().completions.create(**asked)
    [choice] = answer.choices
    assert choice.finish_reason == "length" and choice.text and answer.object == "text_completion"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 7, 9)
    found = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 7
    assert set(found.token_logprobs) == {-0.5} and found.text_offset[:2] == [0, len(found.tokens[0])]
    ids = [1, *parts[0].encode("Hello")]
    assert server.client().completions.create(**asked | {"prompt": ids}).choices[0].text == choice.text
    streamed = list(server.client().completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text
    assert [offset for chunk in streamed for offset in chunk.choices[0].logprobs.text_offset][0] == 0


def test_several_prompts_with_several_continuations(server):
    asked = {"model": "tiny", "prompt": ["Hello", "Other"], "n": 2, "seed": 5, "max_tokens": 6}
    answer = server.client().completions.create(**asked)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) == 4 and answer.usage.completion_tokens == 24
    alone = server.client().completions.create(**asked | {"prompt": "Other"})
    assert [choice.text for choice in alone.choices] == [choice.text for choice in answer.choices[2:]]
    texts = [""] * 4
    for chunk in server.client().completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in answer.choices]


def test_a_chat_streamed_and_whole(server, parts):
    asked = {"model": "tiny", "messages": HELLO, "seed": 1, "logprobs": True, "top_logprobs": 2}
    whole = server.client().chat.completions.create(**asked, max_completion_tokens=20)
    [choice] = whole.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert whole.usage.prompt_tokens == len(parts[1].prompt(HELLO))
    chunks = list(server.client().chat.completions.create(**asked, max_tokens=20, stream=True,
                                                          stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == whole.usage
    assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1]) == choice.message.content
    assert [entry for chunk in chunks[:-1] for entry in chunk.choices[0].logprobs.content] == choice.logprobs.content
    first = choice.logprobs.content[0]
    assert bytes(first.bytes).decode() == first.token and len(first.top_logprobs) == 2
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 19 + ["length"]
    assert any(word in choice.message.content for word in WORDS[3:7]), "not only ASCII"


def test_roles_and_parts_of_a_content(server, parts):
    parted = [{"role": "developer", "content": "Be kind."},
              {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    plain = [{"role": "system", "content": "Be kind."}, *HELLO]
    answers = [server.client().chat.completions.create(model="tiny", messages=one, temperature=0, max_tokens=9)
               for one in (parted, plain)]
    assert answers[0].choices == answers[1].choices and answers[0].usage.prompt_tokens == len(parts[1].prompt(plain))


def test_stop(server):
    asked = {"model": "tiny", "prompt": "Hello", "max_tokens": 40, "temperature": 0}
    text = server.client().completions.create(**asked).choices[0].text
    answer = server.client().completions.create(**asked, stop=["\U0001f600", "never"])
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].text == text.partition("\U0001f600")[0]
    assert "\U0001f600" in text
    assert server.client().completions.create(**asked, stop="never").choices[0].text == text, "a text, not its letters"
    ids = {"stop_token_ids": [300 + WORDS.index("\U0001f600")]}
    by_id = server.client().completions.create(**asked, logprobs=1, extra_body=ids)
    [choice] = by_id.choices
    assert choice.finish_reason == "stop" and choice.text == answer.choices[0].text
    assert len(choice.logprobs.tokens) == by_id.usage.completion_tokens - 1, "a stop id is no part of the text"


def test_seeds(server):
    def text(**options):
        asked = {"model": "tiny", "prompt": "Hello", "max_tokens": 30} | options
        return server.client().completions.create(**asked).choices[0].text

    assert text(seed=7) == text(seed=7) != text(seed=8) and text() != text(), "another text each time without a seed"
    assert text(temperature=0) == text(temperature=0, seed=4)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda seed: text(seed=seed), [7, 1, 2, 7]))[::3] == [text(seed=7)] * 2


def test_sixteen_at_once(server):
    def ask(number):
        return server.client().chat.completions.create(model="tiny", messages=HELLO, seed=number % 4, max_tokens=20,
                                                       ).choices[0].message.content

    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(ask, range(16)))
    assert texts == [ask(number) for number in range(4)] * 4 and len(set(texts)) == 4


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slots(held, monkeypatch, stream):
    """While it waits as well as while it is written."""
    monkeypatch.setattr(held.engine, "max_length", 10**9)  # no answer ends by itself
    body = json.dumps({"messages": HELLO, "n": 3, "stream": stream}).encode()
    for running in (False, True):
        connection = socket.create_connection(("127.0.0.1", int(held.address.rpartition(":")[2])))
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                           b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: held.engine.waiting == 3)
        if running:
            held.engine.gate.set()
            until(lambda: held.engine.running == 3)
        connection.close()
        until(lambda: not held.engine.has_work and not held.desk._open, "a slot was not given back")
        held.engine.gate.clear()


@pytest.mark.parametrize(("path", "body", "message"), [
    ("completions", {}, "prompt is None, expected a text"),
    ("completions", {"prompt": []}, r"prompt is \[\], expected a text"),
    ("completions", {"prompt": [1, "x"]}, "expected a text"),
    ("completions", {"prompt": "x", "temperature": -1}, "temperature is -1, expected a number"),
    ("completions", {"prompt": "x", "temperature": "hot"}, "temperature is 'hot'"),
    ("completions", {"prompt": "x", "temperature": 10**400}, "temperature is 1000"),
    ("completions", {"prompt": "x", "n": 0}, "n is 0, expected an integer of at least 1"),
    ("completions", {"prompt": "x", "max_tokens": 1.5}, "max_tokens is 1.5"),
    ("completions", {"prompt": "x", "logprobs": 99}, "logprobs is 99"),
    ("completions", {"prompt": "x", "stop": ["a"] * 17}, "stop has 17 entries, at most 16"),
    ("completions", {"prompt": "x", "stop": [""]}, "texts that are not empty"),
    ("completions", {"prompt": "x", "stop": {"a": 1}}, "expected a list"),
    ("completions", {"prompt": "x", "stream": "yes"}, "stream is 'yes', expected true or false"),
    ("completions", {"prompt": "x", "echo": True}, "echo is True, which this server does not support"),
    ("completions", {"prompt": "x", "best_of": 3}, "best_of is 3, which this server does not support"),
    ("completions", {"prompt": "x", "temprature": 1}, "field 'temprature' is not known; known are prompt"),
    ("completions", {"prompt": "word " * 99}, "the prompt has 101 tokens, and the context 64"),
    ("completions", {"prompt": [40000]}, "outside of the vocabulary"),
    ("completions", {"prompt": ["x", [40000]]}, "outside of the vocabulary"),
    ("completions", {"prompt": "x", "n": 10**9}, "1 prompts x n 1000000000 is .*, and this server takes 260"),
    ("completions", {"prompt": ["x"] * 129}, "prompt has 129 entries, at most 128"),
    ("chat/completions", {"messages": []}, "expected a list such as"),
    ("chat/completions", {"messages": ["x"]}, r"messages\[0\] is 'x', expected an object"),
    ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\].role is 'tool'"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of the type"),
    ("chat/completions", {"messages": [*HELLO, *HELLO]}, r"messages\[1\] is of the role 'user', expected assistant"),
    ("chat/completions", {"messages": HELLO, "chat_template": "{{ x }}"}, "chat_template is not taken from a request"),
    ("chat/completions", {"messages": HELLO, "tools": [{}]}, "tools is .*, which this server does not support"),
    ("chat/completions", {"messages": HELLO, "top_logprobs": 2}, "top_logprobs needs logprobs: true"),
    ("chat/completions", {"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 2}, "give one of them"),
    ("chat/completions", {"messages": HELLO, "response_format": {"type": "json_object"}}, "does not support"),
    ("chat/completions", {"messages": HELLO, "stream_options": {"x": 1}}, "include_usage"),
])  # fmt: skip
def test_what_cannot_be_is_a_sentence(server, path, body, message):
    client = server.client()
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        client.post(f"/{path}", body=body, cast_to=object)
    assert refused.value.body["type"] == "invalid_request_error"


def test_fields_that_ask_for_nothing_are_taken(server):
    extra = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1, "echo": False,
             "user": "me", "suffix": None, "metadata": {"a": "b"}}
    status, answer = post(server, "/v1/completions", {"prompt": "x", **extra})
    assert status == 200 and answer["usage"]["completion_tokens"] == 16, "OpenAI's default"


def test_other_requests(server):
    status, answer = post(server, "/nothing")
    assert status == 404 and "there are GET /v1/models" in answer["error"]["message"]
    assert post(server, "/v1/completions")[0] == 405
    status, answer = post(server, "/v1/completions", {"prompt": "x"}, kind="text/plain")
    assert status == 400 and "'text/plain', expected application/json" in answer["error"]["message"]
    status, answer = post(server, "/v1/completions", b"x" * (2**20 + 1))
    assert status == 413 and "longer than 1048576 bytes (--max-body)" in answer["error"]["message"]
    status, answer = post(server, "/v1/completions", {"prompt": "x"}, Host="evil.example")
    assert status == 403 and "host 'evil.example' is not this server's" in answer["error"]["message"]
    assert post(server, "/openapi.json")[0] == post(server, "/docs")[0] == 404
    assert post(server, "/health") == (200, {"status": "ok"})


def test_malformed_bodies_neither_end_nor_block_anything(held):
    """30 of them, while another client's stream is under way."""
    with held.client().chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, stream=True) as stream:
        until(lambda: held.engine.waiting == 1)
        for path, body, kind in malformed(30):
            status, answer = post(held, path, body, kind)
            assert 400 <= status < 500 and len(answer["error"]["message"]) > 10, (path, body[:80], status, answer)
        held.engine.gate.set()
        assert sum(len(chunk.choices[0].delta.content) > 0 for chunk in stream) == 5


def test_metrics(server):
    def value(name):
        [line] = [line for line in post(server, "/metrics")[1].splitlines() if line.startswith(name + " ")]
        return float(line.rpartition(" ")[2])

    paths = 'mixtral_requests_total{path="/v1/completions",status="200"}'
    server.client().completions.create(model="tiny", prompt="x", max_tokens=3)
    counts = [paths, "mixtral_prompt_tokens_total", "mixtral_generated_tokens_total", "mixtral_request_seconds_count"]
    before = [value(name) for name in counts]
    server.client().completions.create(model="tiny", prompt="x", max_tokens=3)
    assert [value(name) - was for name, was in zip(counts, before, strict=True)] == [1, 2, 3, 1]
    assert value("mixtral_slots") == 4 and value("mixtral_queue") == value("mixtral_slots_used") == 0
    post(server, "/an/address/of/its/own")
    assert "address" not in post(server, "/metrics")[1], "labels are of a few values"


def test_the_page_is_one_file_that_loads_nothing(server):
    with urllib.request.urlopen(server.address + "/") as answer:
        page, headers = answer.read().decode(), answer.headers
    assert "default-src 'none'" in headers["Content-Security-Policy"] and "text/html" in headers["Content-Type"]
    assert "src=" not in page and "http://" not in page and "https://" not in page and "innerHTML" not in page
