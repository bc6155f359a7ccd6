"""`serve` on a real engine: two tensor-parallel ranks, OpenAI's own client, and the ways in which it ends."""

import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from helpers.events import until
from helpers.malformed import malformed
from helpers.models import tiny_hf_mixtral
from helpers.serving import Served, post

from examples.quickstart.hf_tokenizer import write_hf_tokenizer
from megatron_mixtral import __main__ as commands
from megatron_mixtral.tokenizer import chat_prompts, load_tokenizer

ASK = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tiny_hf_mixtral(tmp_path_factory.mktemp("served") / "tiny", vocab_size=32000, max_position_embeddings=512)
    write_hf_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    served = Served(2, ["--load", str(model), "--tensor-model-parallel-size", "2", "--max-slots", "4"],
                    tmp_path_factory.mktemp("log"))
    yield served
    served.kill()


def chat(server, **options):
    return server.client().chat.completions.create(**({"model": "tiny", "messages": ASK, "max_tokens": 8} | options))


def test_greedy_answers_are_those_of_transformers(server, model):
    from transformers import MixtralForCausalLM

    tokenizer = load_tokenizer("HuggingFaceTokenizer", model)
    ids = chat_prompts(tokenizer, model).prompt(ASK)
    reference = MixtralForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    expected = reference.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=0,
                                  output_scores=True, return_dict_in_generate=True)
    tokens = expected.sequences[0, len(ids):].tolist()
    answer = chat(server, temperature=0, logprobs=True, top_logprobs=1, max_tokens=24)
    assert answer.choices[0].message.content == tokenizer.decode(tokens)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(tokens))
    found = answer.choices[0].logprobs.content
    assert all(entry.token == entry.top_logprobs[0].token for entry in found)
    theirs = [scores[0].log_softmax(-1).max().item() for scores in expected.scores]
    assert [entry.logprob for entry in found] == pytest.approx(theirs, abs=1e-5)
    plain = server.client().completions.create(model="tiny", prompt=ids, max_tokens=24, temperature=0)
    assert plain.choices[0].text == " " + answer.choices[0].message.content, "a completion goes on from its prompt"


def test_a_text_that_cannot_fit_is_refused_by_its_length(server):
    """In any case it would be, but only after seconds of encoding."""
    for path, body, least in (
            ("/v1/completions", {"prompt": "a" * 10**6}, 62500),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 10**6}]}, 62501)):
        status, answer = post(server, path, body)
        said = f"characters, which are {least} tokens or more, and the context 512"
        assert status == 400 and said in answer["error"]["message"]


def test_streams_seeds_and_stops(server):
    """A random model writes of everything: Chinese, emoji, single bytes of characters."""
    options = {"temperature": 1.2, "seed": 11, "max_tokens": 60, "n": 2}
    whole = [choice.message.content for choice in chat(server, **options).choices]
    pieces = ["", ""]
    for chunk in chat(server, **options, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].delta.content
    assert pieces == whole and whole[0] != whole[1] and not whole[0].isascii()
    stop = whole[0][20:23]
    stopped = chat(server, **options | {"n": 1}, stop=stop).choices[0]
    assert stopped.message.content == whole[0].partition(stop)[0] and stopped.finish_reason == "stop"


def test_fifty_requests_sixteen_at_once_and_thirty_malformed(server):
    """The same answer alone and beside others; every slot is given back."""
    def ask(number):
        return chat(server, seed=number % 5, temperature=1.0).choices[0].message.content

    def spoil(case):
        path, body, kind = case
        return post(server, path, body, kind)

    alone = [ask(number) for number in range(5)]
    with ThreadPoolExecutor(16) as pool, ThreadPoolExecutor(2) as others:
        wrong = others.map(spoil, malformed(30, seed=1))
        assert list(pool.map(ask, range(50))) == alone * 10
        assert all(400 <= status < 500 and answer["error"]["message"] for status, answer in wrong)
    until(lambda: server.value("slots_used") == server.value("queue") == 0)
    assert len(set(alone)) == 5 and server.value("slots") == 4


def test_a_client_that_goes_frees_its_slots(server):
    stream = chat(server, n=4, max_tokens=None, temperature=1, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert server.value("slots_used") == 4
    stream.close()
    until(lambda: server.value("slots_used") == 0)


def test_a_lost_rank_ends_the_rest_with_a_sentence(server):
    """The last test of this server."""
    with ThreadPoolExecutor(1) as pool:
        def read():
            return list(chat(server, max_tokens=None, stream=True, extra_body={"ignore_eos": True}))

        asked = pool.submit(read)
        until(lambda: server.value("slots_used") == 1)
        server.signal(signal.SIGKILL, rank=1)
        with pytest.raises(openai.APIError, match="the server ends: another rank has ended"):
            asked.result()
    assert server.end() == [1, -signal.SIGKILL]
    assert "error: another rank has ended" in server.log_text()


def test_sigterm_ends_all_ranks(model, tmp_path):
    """What runs may finish for 5 s; whether it does is a matter of the machine, so unit tests look at that."""
    served = Served(1, ["--load", str(model), "--api-key", "k", "--served-model-name", "mine"], tmp_path)
    with pytest.raises(openai.AuthenticationError):
        served.client().models.list()
    client = served.client(api_key="k")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: client.completions.create(model="mine", prompt="a", max_tokens=500,
                                                              extra_body={"ignore_eos": True}))
        until(lambda: served.value("slots_used") == 1)
        served.signal(signal.SIGTERM)
        try:
            assert asked.result().usage.completion_tokens == 500
        except openai.InternalServerError as error:
            assert "the server has ended" in str(error)
    assert served.end() == [0], served.log_text()
    assert "SIGTERM: finishing what is running, for at most 5 s" in served.log_text()


def test_what_is_wrong_is_one_sentence_before_the_model_is_read(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        assert commands.run("serve", ["--load", str(tmp_path), "--port", str(busy.getsockname()[1])]) == 1
    assert "cannot be opened: Address already in use" in capsys.readouterr().err.splitlines()[-1]
    for flags, said in {("--served-adapter-name", "a"): "is of the model with adapters",
                        ("--served-adapter-name", ""): "is of the model with adapters",
                        ("--served-model-name", ""): "--served-model-name '' is no name that can",
                        ("--adapter", "b", "--served-adapter-name", "two words"): "'two words' is no name that can",
                        ("--adapter", "b", "--served-adapter-name", "m", "--served-model-name", "m"): "both called 'm'",
                        ("--adapter", "b", "--served-model-name", "b"): "are both called 'b': give another",
                        ("--adapter", "b", "--served-adapter-name", tmp_path.name): "are both called"}.items():
        assert commands.run("serve", ["--load", str(tmp_path), *flags]) == 1
        assert said in capsys.readouterr().err.splitlines()[-1]
    assert commands.run("serve", ["--load", str(tmp_path), "--api-key", "@nowhere"]) == 1
    assert "--api-key @nowhere cannot be read" in capsys.readouterr().err.splitlines()[-1]
    assert commands.run("serve", ["--load", str(tmp_path), "--request-timeout", "0"]) == 1
    assert "--request-timeout 0: expected a number of seconds above 0" in capsys.readouterr().err.splitlines()[-1]
