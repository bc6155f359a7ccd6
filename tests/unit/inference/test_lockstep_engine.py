"""The engine in one process: requests come, wait, end and go, and none of it shows in another one's tokens.

One process works through everything; the tests look at what it found.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_hf_mixtral
from helpers.ranks import run_ranks

from megatron_mixtral.config import MixtralConfig, ParallelLayout
from megatron_mixtral.errors import MixtralError
from megatron_mixtral.inference import Generator, SamplingParams
from megatron_mixtral.inference.cache import cache_bytes
from megatron_mixtral.tokenizer import mixtral_tokenizer_path

LENGTH = 40


def said(function: Any, *args: Any, **kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except MixtralError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def drain(engine: Any) -> list[Any]:
    events = []
    while engine.has_work:
        events += engine.step()
    return events


def tokens_of(events: list[Any], name: str, index: int = 0) -> list[int]:
    return [one for event in events if (event.request_id, event.index) == (name, index) for one in event.token_ids]


def refusals(generator: Any, folder: str) -> dict[str, str]:
    engine, greedy = generator.engine, SamplingParams()
    engine.add("taken", [1, 2], greedy)
    found = {
        "empty": said(engine.add, "a", [], greedy), "long": said(engine.add, "a", list(range(40)), greedy),
        "id": said(engine.add, "a", [1, 32000], greedy), "stop id": said(generator.generate, [[1]], SamplingParams(
            stop_token_ids=[40000])),
        "twice": said(engine.add, "taken", [1], greedy), "none taken": str(engine.waiting + len(engine._commands)),
        "params": said(generator.generate, ["a", "b"], [greedy]),
        "layout": said(Generator.from_pretrained, folder, ParallelLayout(tp=2)),
        "cp": said(Generator.from_pretrained, folder, ParallelLayout(cp=2)),
        "length": said(Generator.from_pretrained, folder, max_length=1 << 20),
        "slots": said(Generator.from_pretrained, folder, max_slots=0),
        "memory": said(Generator.from_pretrained, folder, max_slots=1 << 40),
    }
    drain(engine)
    found["again"] = said(engine.add, "taken", [1, 2], greedy)
    drain(engine)
    return found


def cancelling(generator: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Four requests for two slots: one runs and is cancelled, one waits and is, one was never there."""
    engine = generator.engine
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    for name, prompt in zip("abcd", prompts, strict=True):
        engine.add(name, prompt, params)
    events = [event for _ in range(4) for event in engine.step()]
    busy = engine.running, engine.waiting
    for name in ("a", "c", "nobody"):
        engine.cancel(name)
    after = engine.step()
    events += after
    free = engine.running, engine.waiting
    events += drain(engine)
    engine.add("e", prompts[0], params)
    engine.cancel("e")  # before it was ever told
    return {"events": events, "after": after, "busy": busy, "free": free, "never began": drain(engine),
            "idle": (engine.step(), engine.has_work)}


def work(rank: int, folder: str, prompts: list[list[int]]) -> dict[str, Any]:
    import psutil

    generator = Generator.from_pretrained(folder, max_slots=2, max_length=LENGTH, prompt_chunk=7)
    engine = generator.engine
    found = {"refusals": refusals(generator, folder), "cancelling": cancelling(generator, prompts)}
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    found["alone"] = [generator.generate([prompt], params)[0] for prompt in prompts]
    found["chunks"] = []
    for name, prompt in zip("xy", prompts, strict=False):
        engine.add(name, prompt, params)
        found["chunks"].append([len(engine.step()) for _ in range(4)])
        drain(engine)
    sampled = SamplingParams(max_tokens=6, temperature=1.0, seed=3, n=3, ignore_eos=True)
    found["n"] = generator.generate("Once", sampled)
    found["n again"] = generator.generate(["Once", "more"], [sampled, dataclasses.replace(sampled, n=1)])
    unseeded = SamplingParams(max_tokens=20, temperature=2.0, ignore_eos=True)
    found["unseeded"] = [generator.generate("Once", unseeded)[0].token_ids for _ in range(2)]
    found["full"] = generator.generate([[1, 5, 6]], SamplingParams(max_tokens=None, ignore_eos=True))[0]
    [plain] = generator.generate("Once upon", params)
    found["plain"], found["streamed"] = plain, list(generator.stream("Once upon", params))
    for event in generator.stream("Once upon", params):  # noqa: B007 - what is looked at is what breaking leaves
        break
    found["left early"] = (drain(engine), engine.running)
    found["stop id"] = generator.generate("Once upon", dataclasses.replace(params, stop_token_ids=[plain.token_ids[4]]))
    engine.stop_token_ids = frozenset({plain.token_ids[6]})
    found["model's own"] = generator.generate("Once upon", SamplingParams(max_tokens=10))
    found["ignored"] = generator.generate("Once upon", params)
    found["stop text"] = generator.generate("Once upon", dataclasses.replace(params, stop=[plain.text[3:7]]))
    with torch.no_grad():
        weight = engine._stage.model.decoder.layers[1].self_attention.linear_qkv.weight
        kept = weight.clone()
        weight.fill_(torch.nan)
        found["no number"] = generator.generate(prompts[2:3], params)[0]  # all of its keys and values
        weight.copy_(kept)
        found["after it"] = generator.generate([prompts[1], prompts[0]], params)  # the short one in its slot
        engine._stage.model.output_layer.weight[7] = torch.nan
    found["nan"] = generator.generate([[1]], params)[0]
    engine.close()
    found["closed"] = said(engine.step)
    del generator, engine
    before = psutil.Process().memory_info().rss
    large = Generator.from_pretrained(folder, max_slots=8, max_length=8192)
    found["grown"] = psutil.Process().memory_info().rss - before
    cache = large.engine._stage.cache
    found["cache"] = cache.keys.nbytes + cache.values.nbytes
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with Mixtral's tokenizer: what it writes are bytes and pieces of every script."""
    found = tiny_hf_mixtral(tmp_path_factory.mktemp("engine") / "hf", vocab_size=32000, num_key_value_heads=4,
                            max_position_embeddings=8192, eos_token_id=[2, 31999])
    shutil.copyfile(mixtral_tokenizer_path(), found / "tokenizer.model")
    return found


@pytest.fixture(scope="module")
def found(folder) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 32000, (length,), generator=generator).tolist() for length in (16, 3, 20, 9)]
    [everything] = run_ranks(1, work, str(folder), prompts)
    return everything


def test_what_cannot_be_is_refused_with_a_sentence(found) -> None:
    refusals = found["refusals"]
    assert refusals["empty"] == "ConfigError: the prompt is empty: give at least one token"
    assert refusals["long"] == ("ConfigError: the prompt has 40 tokens, and the context 40, of which one at least has "
                                "to be free: shorten it, or raise max_length (--max-length)")
    assert refusals["id"] == "ConfigError: token id 32000 is not one of the model's 32000"
    assert "token id 40000" in refusals["stop id"] and refusals["none taken"] == "1"
    assert refusals["twice"] == "ConfigError: request 'taken' is under way: give another name"
    assert refusals["again"] == "no error"
    assert refusals["params"] == "ConfigError: 1 params for 2 prompts: give one, or one for each"
    assert "layout tp2-pp1-ep1 needs 2 ranks, and this program is one process: start it as\n    torchrun " \
        "--nproc-per-node 2 " in refusals["layout"]
    assert "a continuation is not cut over devices; leave cp out" in refusals["cp"]
    assert "max_length is 1048576, expected 2 to 8192, the longest context of the model" in refusals["length"]
    assert "max_slots is 0" in refusals["slots"]
    assert "of cache: 1099511627776 slots x 4096 tokens in float32, together more than the " in refusals["memory"]


def test_cancelled_requests_free_their_slots_and_leave_the_others_alone(found) -> None:
    events, after = found["cancelling"]["events"], found["cancelling"]["after"]
    assert found["cancelling"]["busy"] == (2, 2)
    assert [(one.request_id, one.finish_reason) for one in after[:2]] == [("a", "cancelled"), ("c", "cancelled")]
    assert found["cancelling"]["free"] == (2, 0)  # b goes on, and d has begun in the slot of a
    for place, name in ((1, "b"), (3, "d")):
        assert tokens_of(events, name) == list(found["alone"][place].token_ids)
    assert 0 < len(tokens_of(events, "a")) < 10 and not tokens_of(events, "c")
    assert sorted(one.request_id for one in events if one.finish_reason) == list("abcd")
    assert [one.finish_reason for one in found["cancelling"]["never began"]] == ["cancelled"]
    assert found["cancelling"]["idle"] == ([], False)


def test_a_long_prompt_is_read_in_chunks(found) -> None:
    assert found["chunks"] == [[0, 0, 1, 1], [1, 1, 1, 1]]  # 16 tokens by 7; 3 tokens


def test_continuations_of_one_prompt_differ_and_come_again(found) -> None:
    ids = [one.token_ids for one in found["n"]]
    assert [one.index for one in found["n"]] == [0, 1, 2] and len(set(ids)) == 3
    assert [one.token_ids for one in found["n again"][:3]] == ids
    assert [one.index for one in found["n again"]] == [0, 1, 2, 0]
    first, second = found["unseeded"]
    assert first != second


def test_a_full_context_ends_with_a_sentence(found) -> None:
    full = found["full"]
    assert full.finish_reason == "length" and len(full.token_ids) == LENGTH - 3
    assert full.message == "the context is full: 3 tokens of the prompt + 37 new ones = 40; raise max_length " \
        "(--max-length)"


def test_streamed_pieces_are_the_whole(found) -> None:
    plain, streamed = found["plain"], found["streamed"]
    assert "".join(one.text for one in streamed) == plain.text and len(streamed) == 10
    assert sum((one.token_ids for one in streamed), ()) == plain.token_ids
    assert [one.finish_reason for one in streamed] == [None] * 9 + ["length"]
    events, running = found["left early"]
    assert [one.finish_reason for one in events] == ["cancelled"] and running == 0


def test_stops(found) -> None:
    plain, ids = found["plain"], found["plain"].token_ids
    [by_id], [own], [ignored], [by_text] = (found[name] for name in ("stop id", "model's own", "ignored", "stop text"))
    assert by_id.token_ids == ids[:ids.index(ids[4]) + 1] and by_id.stop_reason == ids[4]
    assert own.token_ids == ids[:ids.index(ids[6]) + 1] and (own.finish_reason, own.stop_reason) == ("stop", ids[6])
    assert plain.text.startswith(own.text) and ignored == plain
    assert by_text.text == plain.text[:plain.text.index(plain.text[3:7])] and by_text.stop_reason == plain.text[3:7]


def test_logits_that_are_no_numbers_end_a_request_not_the_engine(found) -> None:
    assert found["no number"].finish_reason == "error"
    assert [one.token_ids for one in found["after it"]] == [found["alone"][place].token_ids for place in (1, 0)]
    assert found["nan"].finish_reason == "error" and "not finite" in found["nan"].message
    assert found["nan"].token_ids == ()
    assert found["closed"] == "ConfigError: the engine is closed: make another Generator"


def test_the_cache_takes_what_was_predicted(folder, found) -> None:
    config = MixtralConfig.from_hf_dir(folder)
    predicted = cache_bytes(config, ParallelLayout(), 8, 8192, 4)
    assert predicted == found["cache"] == 2 * 4 * 8 * 8192 * 4 * 8 * 4
    model = 2 * config.total_parameters * 4  # in memory, and its file, which is mapped
    assert abs(found["grown"] - predicted) < 0.05 * predicted + model
