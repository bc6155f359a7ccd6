"""A server's keys, limits and ends, each on a server of its own with an engine without a model."""

import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from helpers.events import HANG, until
from helpers.fake_engine import fake_generator
from helpers.serving import post, serving, tokenizer_and_prompts

from megatron_mixtral.errors import ConfigError, MixtralError
from megatron_mixtral.server import open_socket

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tokenizer_and_prompts(tmp_path_factory.mktemp("model"))


def test_a_key(parts):
    with serving(fake_generator(parts[0]), parts[1], api_key="s3cret") as server:
        assert [model.id for model in server.client(api_key="s3cret").models.list()] == ["tiny"]
        for wrong in ("none", "s3cre", "s3crett"):
            with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
                server.client(api_key=wrong).chat.completions.create(model="tiny", messages=HELLO)
        assert post(server, "/v1/models")[0] == 401 and post(server, "/health")[0] == 200
        assert post(server, "/v1/models", Authorization="Bearer \u00fc")[0] == 401


def test_the_limit_of_the_queue(parts):
    generator = fake_generator(parts[0])
    generator.engine.gate.clear()
    with serving(generator, parts[1], max_queue=2) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, server, "/v1/completions", {"prompt": "x", "n": 4})
        until(lambda: generator.engine.waiting == 4)
        with pytest.raises(openai.RateLimitError, match="4 continuations are under way, and 3 more"):
            server.client().completions.create(model="tiny", prompt="x", n=3)
        generator.engine.gate.set()
        assert first.result()[0] == 200


def test_the_limit_of_time(parts):
    generator = fake_generator(parts[0])
    generator.engine.gate.clear()
    with serving(generator, parts[1], request_timeout=0.1) as server:
        with pytest.raises(openai.APIStatusError, match=r"longer than 0.1 s \(--request-timeout\)") as late:
            server.client().completions.create(model="tiny", prompt="x", n=6)
        assert late.value.status_code == 504 and late.value.response.headers["x-should-retry"] == "false"
        with pytest.raises(openai.APIError, match="longer than 0.1 s"):
            list(server.client().completions.create(model="tiny", prompt="x", stream=True))
        until(lambda: not generator.engine.has_work)


def test_a_long_text_does_not_hold_up_short_ones(parts):
    """Its encoding waits for the test; short texts of both kinds are encoded and answered meanwhile."""
    generator, begun, may_go, threads = fake_generator(parts[0]), threading.Event(), threading.Event(), {}
    encode, text = generator.encode, "word " * 30_000

    def held(prompt):
        threads[prompt] = threading.get_ident()
        if prompt == text:
            begun.set()
            assert may_go.wait(HANG)
        return encode(prompt)

    generator.encode = held
    with serving(generator, parts[1]) as server, ThreadPoolExecutor(1) as pool:
        may_go.set()
        assert [post(server, "/v1/completions", {"prompt": one})[0] for one in (text, "x")] == [400, 200]
        assert len(set(threads.values())) == 2, "without this, what follows would wait for ever"
        may_go.clear()
        begun.clear()
        long = pool.submit(post, server, "/v1/completions", {"prompt": text})
        assert begun.wait(HANG)
        assert post(server, "/v1/completions", {"prompt": "x"})[0] == 200
        assert post(server, "/v1/chat/completions", {"messages": HELLO})[0] == 200
        assert not long.done()
        may_go.set()
        status, answer = long.result()
        assert status == 400 and "and the context 64" in answer["error"]["message"]


def test_an_engine_that_ends_tells_everybody_who_waits(parts):
    generator = fake_generator(parts[0])
    generator.engine.gate.clear()
    with serving(generator, parts[1]) as server, ThreadPoolExecutor(2) as pool:
        def ask(stream):
            answer = server.client().chat.completions.create(model="tiny", messages=HELLO, stream=stream)
            return list(answer) if stream else answer

        asked = [pool.submit(ask, stream) for stream in (True, False)]
        until(lambda: generator.engine.waiting == 2)
        generator.engine.fails = MixtralError("rank 1 has ended")
        for one in asked:
            with pytest.raises(openai.APIError, match="the server ends: rank 1 has ended"):
                one.result()
        assert not generator.engine.closed, "there is nobody left to tell"
        assert post(server, "/health")[0] == 503
        with pytest.raises(openai.InternalServerError, match="the server ends: rank 1 has ended"):
            ask(False)


def test_a_server_that_ends_finishes_what_runs(parts):
    generator = fake_generator(parts[0])
    generator.engine.gate.clear()
    with serving(generator, parts[1]) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: server.client().completions.create(model="tiny", prompt="x", max_tokens=4))
        until(lambda: generator.engine.waiting == 1)
        server.desk.close(grace=60)
        until(lambda: server.desk.closed)
        assert post(server, "/v1/completions", {"prompt": "x"})[0] == 503
        generator.engine.gate.set()
        assert asked.result().usage.completion_tokens == 4
        until(lambda: generator.engine.closed)


def test_a_server_that_ends_waits_only_so_long(parts):
    generator = fake_generator(parts[0])
    generator.engine.gate.clear()
    with serving(generator, parts[1]) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: server.client().completions.create(model="tiny", prompt="x"))
        until(lambda: generator.engine.waiting == 1)
        server.desk.close(grace=0.05)
        with pytest.raises(openai.InternalServerError, match="the server has ended"):
            asked.result()
        assert generator.engine.closed


def test_a_busy_port_is_a_sentence():
    with open_socket("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port} cannot be opened: .*in use.*such as --port {port + 1}"):
            open_socket("127.0.0.1", port)
    with pytest.raises(ConfigError, match="--host 192.0.2.1"):
        open_socket("192.0.2.1", 0)
    with pytest.raises(ConfigError, match="--port 70000: expected 0 to 65535"):
        open_socket("127.0.0.1", 70000)


def test_an_engine_without_work_is_stepped_now_and_then(parts, monkeypatch):
    monkeypatch.setattr("megatron_mixtral.server.desk.HEARTBEAT", 0.01)
    with serving(fake_generator(parts[0]), parts[1]) as server:
        until(lambda: server.engine.steps > 3)
    assert threading.active_count() < 20
