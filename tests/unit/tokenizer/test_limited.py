"""Texts that cannot fit a context are refused before they are encoded, and no text that fits is."""

import itertools
import sys
import threading
import time

import pytest
import tokenizers
from helpers.documents import random_texts
from helpers.json_fuzz import random_lines

from examples.quickstart.hf_tokenizer import write_hf_tokenizer
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.tokenizer.engines import native
from megatron_mixtral.tokenizer.limited import LimitedTokenizer
from megatron_mixtral.tokenizer.tokenizer import open_tokenizer

LONGEST = 16  # of Mixtral's pieces, the most spaces


@pytest.fixture(scope="module", params=["tokenizer.json", "tokenizer.model"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    write_hf_tokenizer(folder)
    return open_tokenizer(folder / request.param)


def test_no_text_has_fewer_ids_than_its_characters_say(tokenizer):
    assert native.most_characters(tokenizer) == LONGEST
    lines = (line.decode(errors="replace") for line in itertools.islice(random_lines(3), 300))
    spaces = [" " * count + word for count in range(1, 70) for word in ("", "a", "</s>")]
    for text in (*random_texts(300, tokenizer), *lines, *spaces, " " * 100 * LONGEST):
        for ids in (tokenizer.encode(text), tokenizer.encode_with_controls(text)):
            assert len(ids) * LONGEST >= len(text), text
    assert len(tokenizer.encode(" " * 100 * LONGEST)) in (100, 101), "so near does it come"


class Watched:
    """A tokenizer, and what it was asked to encode."""

    def __init__(self, tokenizer):
        self.tokenizer, self.encoded = tokenizer, []

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode(self, text):
        self.encoded.append(text)
        return self.tokenizer.encode(text)

    def encode_aside(self, text, controls=False):
        return self.encode(text)

    encode_with_controls = encode


def test_a_text_that_cannot_fit_is_not_encoded(tokenizer, monkeypatch):
    monkeypatch.setattr(native, "bpe_tables", lambda given, tables=native.bpe_tables: tables(given.tokenizer))
    watched = Watched(tokenizer)
    limited = LimitedTokenizer(watched, 100)
    for encode in (limited.encode, limited.encode_with_controls):
        with pytest.raises(ConfigError, match="the prompt has 1601 characters, which are 101 tokens or more, and the "
                                              r"context 100: shorten it, or raise max_length \(--max-length\)"):
            encode("a" * 1601)
        assert not watched.encoded
    for text in ("a" * 1600, "a" * 401, "b", ""):
        assert limited.encode(text) == tokenizer.encode(text) and watched.encoded.pop() == text
    assert limited.bos_id == tokenizer.bos_id and limited.decode([22557]) == tokenizer.decode([22557])


def test_other_threads_go_on_while_a_long_text_is_encoded(tokenizer):
    """No thread takes another one's turn here: one that counts goes on only where encoding lets it."""
    text, limited, seen, ended = "word " * 10_000, LimitedTokenizer(tokenizer, 10**6), [0], threading.Event()

    def count():
        while not ended.is_set():
            seen[0] += 1
            time.sleep(0)

    def counted(encode):
        before = seen[0]
        encode(text)
        return seen[0] > before

    counting = threading.Thread(target=count)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        counting.start()
        for encode in (limited.encode, limited.encode_with_controls):
            assert any(counted(encode) for _ in range(100))
    finally:
        sys.setswitchinterval(before)
        ended.set()
        counting.join()
    assert limited.encode(text) == limited.encode_with_controls(text) == tokenizer.encode(text)


def test_a_tokenizer_that_may_leave_characters_out_encodes(tmp_path):
    """How many ids a text has is then not known from its length."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>"))
    model.normalizer = tokenizers.normalizers.Strip()
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json")
    assert native.most_characters(tokenizer) is None
    assert LimitedTokenizer(tokenizer, 3).encode(" " * 1000 + "aa") == [0, 0]


def test_control_strings_that_take_the_spaces_around_them_say_nothing_of_a_length(tmp_path):
    write_hf_tokenizer(tmp_path)
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model.add_special_tokens([tokenizers.AddedToken("<mark>", rstrip=True)])
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json")
    assert len(tokenizer.encode_with_controls("<mark>" + " " * 1000)) == 1
    assert native.most_characters(tokenizer) is None
