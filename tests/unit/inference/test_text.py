"""Tokens to text as it streams: the pieces are the whole, no character is ever broken, stop texts end it."""

import random
import sys
from pathlib import Path

import pytest

from megatron_mixtral.inference import SamplingParams
from megatron_mixtral.inference.continuation import BROKEN, Continuation, TextStream
from megatron_mixtral.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "Once upon a time, there was a model.", "你好，世界。专家混合模型！", "ok 🙂 and 👍🏽, then 👩‍👩‍👧 at the end 🎉",
    "mixed 中文 and emoji 🚀 and  two  spaces\n\n    def f(x):\n        return x", "Ω≈ç√∫ é ñ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠀀𠀁",
]


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    """Mixtral's, by sentencepiece and by the `tokenizers` library: the two decode bytes differently."""
    root = Path(__file__).resolve().parents[3]
    sys.path.insert(0, str(root / "examples" / "quickstart"))
    from hf_tokenizer import write_hf_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_hf_tokenizer(folder)
    return load_tokenizer("HuggingFaceTokenizer", folder / request.param)


def pieces(tokenizer: Tokenizer, prompt_ids: list[int], ids: list[int], *stop: str) -> tuple[list[str], str | None]:
    stream = TextStream(tokenizer.decode, prompt_ids, stop)
    found = []
    for token_id in ids:
        found.append(stream.push(token_id))
        if stream.matched is not None:
            return found, stream.matched
    return [*found, stream.finish()], stream.matched


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_whole_wherever_the_prompt_ends(tokenizer, text) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    for end in range(1, len(ids)):
        found, _ = pieces(tokenizer, ids[:end], ids[end:])
        prompt = tokenizer.decode(ids[:end])
        while prompt.endswith(BROKEN):  # the character at the border belongs to the continuation
            prompt = tokenizer.decode(ids[:(end := end - 1)])
        assert prompt + "".join(found) == text
        assert not any(BROKEN in piece for piece in found)


def test_characters_come_as_soon_as_they_are_whole(tokenizer) -> None:
    ids = tokenizer.encode("a 🙂 b")
    found, _ = pieces(tokenizer, [tokenizer.bos_id], ids)
    assert sum(bool(piece) for piece in found) >= 4 and found[0].strip() == "a" and found[-2] == " b"


def test_a_character_that_is_cut_off_is_left_out(tokenizer) -> None:
    ids = tokenizer.encode("well 🦤")  # a dodo, which the vocabulary has as four bytes
    assert tokenizer.decode(ids[:-1]).endswith(BROKEN)
    for cut in range(len(ids) - 3, len(ids)):
        assert "".join(pieces(tokenizer, [], ids[:cut])[0]).rstrip() == "well"


def test_any_ids_whatever_give_text_without_end_or_harm(tokenizer) -> None:
    draw = random.Random(5)
    for _ in range(50):
        ids = [draw.randrange(3, 300 if draw.random() < 0.5 else 32000) for _ in range(40)]  # 3 to 258 are bytes
        found, _ = pieces(tokenizer, [1], ids)
        assert not found[-1].endswith(BROKEN) and len("".join(found)) <= 40 * 16


@pytest.mark.parametrize(("text", "stop", "before"), [
    ("one two three four", ["three"], "one two "),
    ("one two three four", ["wo th"], "one t"),  # across a border of tokens
    ("one two three four", ["thx", "four", "ee f"], "one two thr"),
    ("abababac", ["abac"], "abab"),  # what looked like a stop text was its second beginning
    ("你好，世界", ["世"], "你好，"), ("hello 🙂 you", ["🙂"], "hello "),
    ("ends with it.", ["it."], "ends with "),
])
def test_stop_texts(tokenizer, text, stop, before) -> None:
    found, matched = pieces(tokenizer, [1], tokenizer.encode(text), *stop)
    assert "".join(found) == before and matched in stop


def test_text_that_only_began_like_a_stop_text_is_not_lost(tokenizer) -> None:
    for text in ("one two thr", "one two three", "thre"):
        found, matched = pieces(tokenizer, [1], tokenizer.encode(text), "threes", "twothree")
        assert "".join(found) == text and matched is None


def continuation(tokenizer: Tokenizer, stop_ids: tuple[int, ...] = (), **params: object) -> Continuation:
    own = SamplingParams(**params)
    return Continuation("a", 0, (1, 2), own, frozenset(stop_ids), 10, TextStream(tokenizer.decode, (1, 2), own.stop))


def test_reasons_to_end(tokenizer) -> None:
    ids = tokenizer.encode("one two three four five six seven eight nine ten")
    by_id = continuation(tokenizer, stop_ids=(ids[2],))
    last = [by_id.take(token_id) for token_id in ids[:3]][-1]
    assert (last.finish_reason, last.stop_reason, last.token_ids, last.text) == ("stop", ids[2], (ids[2],), "")
    by_text = continuation(tokenizer, stop=["two"])
    last = [by_text.take(token_id) for token_id in ids[:2]][-1]
    assert (last.finish_reason, last.stop_reason, last.message) == ("stop", "two", None)
    by_length = continuation(tokenizer, max_tokens=2)
    first, last = (by_length.take(token_id) for token_id in ids[:2])
    assert first.finish_reason is None and (last.finish_reason, last.message) == ("length", None)
    full = continuation(tokenizer, max_tokens=None)
    news = [full.take(token_id) for token_id in ids[:8]]
    assert [one.finish_reason for one in news] == [None] * 7 + ["length"]
    assert "2 tokens of the prompt + 8 new ones = 10; raise max_length" in news[-1].message
    broken = continuation(tokenizer).take(-1)
    assert broken.finish_reason == "error" and "not finite" in broken.message and broken.token_ids == ()
