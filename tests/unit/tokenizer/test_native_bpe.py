"""The native engine gives the ids of sentencepiece and of `tokenizers`, for every vocabulary that it serves."""

import pickle
import random
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import native_fuzz
from helpers.documents import first_difference, random_texts, real_documents
from helpers.native_build import SANITIZERS, compile_extension, ensure_extension, run_sanitized
from helpers.vocabularies import edit_json, edit_model, train_sentencepiece

from examples.quickstart.hf_tokenizer import write_hf_tokenizer
from megatron_mixtral.errors import DataError
from megatron_mixtral.tokenizer.engines import native
from megatron_mixtral.tokenizer.engines.base import EngineUnavailable, SpecialTokens
from megatron_mixtral.tokenizer.engines.bpe_tables import bpe_tables
from megatron_mixtral.tokenizer.tokenizer import NASTY_STRINGS, mixtral_tokenizer_path, open_tokenizer

MIXTRAL = ("tokenizer.model", "tokenizer.json")
BARE = SpecialTokens(None, None)


@pytest.fixture(scope="module", autouse=True)
def extension(tmp_path_factory):
    ensure_extension(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """Folder of the real Mixtral tokenizer, in both forms."""
    path = tmp_path_factory.mktemp("mixtral")
    write_hf_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small sentencepiece model in Llama's settings."""
    return train_sentencepiece(tmp_path_factory.mktemp("small") / "tokenizer.model")


def check(path: Path, texts) -> None:
    tokenizer = open_tokenizer(path)
    assert first_difference(native.NativeEngine(tokenizer), tokenizer, texts) is None


@pytest.mark.parametrize("name", MIXTRAL)
def test_real_documents_and_random_strings(mixtral, name):
    check(mixtral / name, [*NASTY_STRINGS, *real_documents(400, 3000)])
    check(mixtral / name, random_texts(8000, open_tokenizer(mixtral / name)))


DOCUMENT = "[REFERENCE_DOC_1]"  # one of twenty pieces of the v3 tokenizer that a text is searched for before any merge


@pytest.mark.parametrize("form", ["model", "json"])
def test_the_tokenizer_of_8x22b(tmp_path, form):
    """The v3 tokenizer, of 32,768 ids, as sentencepiece and as the tokenizer.json made of it."""
    path = mixtral_tokenizer_path().with_name("mistral_instruct_tokenizer_240323.model.v3")
    if form == "json":
        write_hf_tokenizer(tmp_path, path)
        path = tmp_path / "tokenizer.json"
    tokenizer = open_tokenizer(path)
    assert tokenizer.vocab_size == 32768
    controls = [f"a{word} b" for word in tokenizer.control_tokens()]
    assert len(controls) > 700 or form == "json"
    check(path, [*NASTY_STRINGS, *controls, *real_documents(200, 3000), *random_texts(3000, tokenizer)])
    pieces = [DOCUMENT, "[REFERENCE_DOC_19]", "[REFERENCE_DOC_", "]", " ", "\u2581", "x", "\n", "\u4e2d"]
    draw = random.Random(4)
    texts = ["".join(draw.choices(pieces, k=draw.randrange(1, 9))) for _ in range(1500)]
    check(path, texts)
    engine = native.NativeEngine(tokenizer)
    ids, lengths = engine.encode([*texts, ""], SpecialTokens(1, 2))
    assert ids.dtype == np.uint16 and lengths[-1] == 0 and (ids == 2).sum() == len(texts)
    if form == "model":
        assert tokenizer.encode(DOCUMENT) == [29473, 769] and (ids == 769).sum() > 500
        assert first_difference(pickle.loads(pickle.dumps(engine)), tokenizer, texts) is None


def test_of_two_user_defined_pieces_the_longer_is_found(tmp_path):
    path = train_sentencepiece(tmp_path / "tokenizer.model", user_defined_symbols=["<x", "<x>", "\u2603", "ab"])
    draw = random.Random(5)
    texts = ["".join(draw.choices("<x>\u2603ab c", k=draw.randrange(1, 12))) for _ in range(3000)]
    check(path, [*NASTY_STRINGS, *texts])


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTRAL)
def test_many_documents_and_random_strings(mixtral, name):
    check(mixtral / name, real_documents(20_000, 30_000))
    check(mixtral / name, random_texts(100_000, open_tokenizer(mixtral / name), seed=2))


@pytest.mark.parametrize(
    "options",
    [
        {"split_by_whitespace": False, "max_sentencepiece_length": 40},  # pieces with spaces inside
        {"add_dummy_prefix": False, "allow_whitespace_only_pieces": True},
        {"character_coverage": 0.98, "split_digits": True, "split_by_unicode_script": False},
    ],
    ids=["across_spaces", "no_prefix", "few_characters"],
)
def test_other_sentencepiece_vocabularies(tmp_path, options):
    path = train_sentencepiece(tmp_path / "tokenizer.model", **options)
    check(path, [*NASTY_STRINGS, *real_documents(100, 3000), *random_texts(4000, open_tokenizer(path))])


def test_pieces_added_with_equal_scores(small, tmp_path):
    """As in Chinese-Mixtral: pieces put at the end with score 0, some made of characters that are no pieces."""

    def add(proto):
        for text in ("\u7684\u4e2d", "\u4e2d\u7684", "\u7684\u4e2d\u7684", "aba", "bab", "ab", "ba", "\u2603\u2604"):
            if all(piece.piece != text for piece in proto.pieces):
                proto.pieces.add(piece=text, score=0.0)

    path = edit_model(small, tmp_path / "tokenizer.model", add)
    draw = random.Random(3)
    texts = ["".join(draw.choices("ab\u7684\u4e2d\u2603\u2604 ", k=draw.randrange(60))) for _ in range(4000)]
    check(path, texts)
    tables = bpe_tables(open_tokenizer(path))
    assert (tables.characters[:, 1] >= tables.vocab_size).sum() >= 2  # the snowman and the comet are only parts


@pytest.mark.parametrize("seed", range(12))
def test_random_merges(mixtral, tmp_path, seed):
    """A vocabulary of nothing but chance, which no training would give: deep chains, overlaps, dead ends."""
    draw = random.Random(seed)
    letters = "abcd\u2581\u4e2d\U0001f600"

    def replace(content):
        vocab = {piece: i for piece, i in content["model"]["vocab"].items() if i < 259}
        for letter in letters:
            vocab[letter] = len(vocab)
        merges, pieces = [], list(letters)
        for _ in range(60):
            left, right = draw.choice(pieces), draw.choice(pieces)
            if [left, right] not in merges and len(left + right) < 12:
                merges.append([left, right])
                pieces.append(left + right)
                vocab.setdefault(left + right, len(vocab))
        draw.shuffle(merges)
        content["model"] |= {"vocab": vocab, "merges": merges}

    path = edit_json(mixtral / "tokenizer.json", tmp_path / "tokenizer.json", replace)
    alphabet = letters.replace("\u2581", " ") + "x"
    check(path, ["".join(draw.choices(alphabet, k=draw.choice((5, 20, 45, 200)))) for _ in range(600)])


def metaspace(scheme):
    def change(content):
        content["normalizer"] = None
        content["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False,
        }  # fmt: skip

    return change


def only_replace(content):
    content["normalizer"] = content["normalizer"]["normalizers"][1]


@pytest.mark.parametrize(
    "change", [metaspace("always"), metaspace("first"), metaspace("never"), only_replace],
    ids=["metaspace_always", "metaspace_first", "metaspace_never", "only_replace"],
)  # fmt: skip
def test_other_forms_of_tokenizer_json(mixtral, tmp_path, change):
    path = edit_json(mixtral / "tokenizer.json", tmp_path / "tokenizer.json", change)
    starts = ["x", " x", "  x", "\u2581x", "\u2581", " ", "", "\n x"]
    check(path, [*NASTY_STRINGS, *starts, *random_texts(1000, open_tokenizer(path))])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "not BPE"),
        ({"byte_fallback": False}, "no byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalized"),
        ({"remove_extra_whitespaces": True}, "white space is removed"),
        ({"treat_whitespace_as_suffix": True}, "suffix"),
        ({"user_defined_symbols": ["a b"]}, "has a space in it"),
        ({"control_symbols": ["\u00a7"]}, "single character"),
    ],
)
def test_other_sentencepiece_models_are_declined(tmp_path, options, reason):
    path = train_sentencepiece(tmp_path / "tokenizer.model", **options)
    with pytest.raises(EngineUnavailable, match=reason):
        native.NativeEngine(open_tokenizer(path))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda content: content["model"].update(byte_fallback=False), "no byte fallback"),
        (lambda content: content.update(normalizer={"type": "NFC"}), "neither"),
        (lambda content: content.update(pre_tokenizer={"type": "Digits", "individual_digits": True}), "neither"),
        (lambda content: (metaspace("first")(content), content["pre_tokenizer"].update(split=True)), "neither"),
        (lambda content: content["added_tokens"][0].update(special=False), "not special"),
        (lambda content: content["model"]["vocab"].pop("<0x41>"), "255 byte pieces"),
    ],
)
def test_other_json_tokenizers_are_declined(mixtral, tmp_path, change, reason):
    path = edit_json(mixtral / "tokenizer.json", tmp_path / "tokenizer.json", change)
    with pytest.raises(EngineUnavailable, match=reason):
        native.NativeEngine(open_tokenizer(path))


@pytest.mark.parametrize(("size", "dtype"), [(65499, np.uint16), (65500, np.int32), (70000, np.int32)])
def test_ids_of_large_vocabularies_are_whole(small, tmp_path, size, dtype):
    def grow(proto):
        for index in range(len(proto.pieces), size):
            proto.pieces.add(piece=chr(0x20000 + index), score=-1e6)

    tokenizer = open_tokenizer(edit_model(small, tmp_path / "tokenizer.model", grow))
    ids, lengths = native.NativeEngine(tokenizer).encode([chr(0x20000 + size - 1)], BARE)
    assert ids.dtype == dtype and ids[-1] == size - 1
    assert ids.tolist() == tokenizer.encode(chr(0x20000 + size - 1))


def test_frame(mixtral):
    engine = native.NativeEngine(open_tokenizer(mixtral / "tokenizer.model"))
    for specials, expected in (
        (SpecialTokens(1, 2), [1, 264, 2, 1, 287, 2]),
        (SpecialTokens(None, 2), [264, 2, 287, 2]),
        (SpecialTokens(1, None), [1, 264, 1, 287]),
    ):
        ids, lengths = engine.encode(["a", "", "b"], specials)
        assert ids.tolist() == expected
        assert lengths.tolist() == [len(expected) // 2, 0, len(expected) // 2]
    ids, lengths = engine.encode([], SpecialTokens(1, 2))
    assert (ids.size, lengths.size) == (0, 0)


def test_words_of_megabytes_take_time_in_proportion(mixtral):
    """A word is merged in n log n. Quadratic work would be 64 times as much for 8 times the text."""
    tokenizer = open_tokenizer(mixtral / "tokenizer.model")
    engine = native.NativeEngine(tokenizer)
    for character in "a =":
        seconds = []
        for count in (125_000, 1_000_000):
            start = time.process_time()
            ids, _ = engine.encode([character * count], BARE)
            seconds.append(time.process_time() - start)
        assert seconds[1] < 32 * seconds[0]
        assert tokenizer.decode(ids.tolist()) == character * count


def test_what_cannot_be_text_is_an_error(mixtral):
    engine = native.NativeEngine(open_tokenizer(mixtral / "tokenizer.model"))
    with pytest.raises(DataError, match="surrogate"):
        engine.encode(["a", "\ud800"], BARE)
    with pytest.raises(TypeError):
        engine.encode([b"bytes"], BARE)
    assert engine.encode(["a"], BARE)[0].tolist() == [264]


@pytest.mark.slow
def test_a_document_that_is_too_long_is_an_error(mixtral):
    engine = native.NativeEngine(open_tokenizer(mixtral / "tokenizer.model"))
    with pytest.raises(DataError, match="2\\^31 bytes or more. Cut it"):
        engine.encode(["a" * 2**31], BARE)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("merges", [32000, 1, 1, 1], "unknown symbol"),
        ("merges", [1, 1, 1, 32000], "outside the vocabulary"),
        ("characters", [0x110000, 5], "no code point"),
        ("characters", [0x61, 40000], "numbered from vocab_size on"),
        ("joins", [0x10FFFF, 0x61], "no symbol"),
    ],
)
def test_tables_that_would_lead_out_of_memory_are_refused(mixtral, name, row, message):
    tables = bpe_tables(open_tokenizer(mixtral / "tokenizer.model"))
    values = dict(vars(tables))
    values[name] = np.vstack([values[name], np.array([row], dtype=np.uint32)])
    order = ("vocab_size", "characters", "merges", "joins", "byte_ids", "prefix")
    with pytest.raises(ValueError, match=message):
        native.load_module().Encoder(*(values[key] for key in order))


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTRAL)
def test_sanitizers_find_nothing(mixtral, tmp_path, name):
    """The same comparisons with an extension that checks every access and every undefined operation."""
    library = compile_extension(tmp_path, *SANITIZERS)
    done = run_sanitized(native_fuzz.__file__, library, mixtral / name, 20_000)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert done.stdout.endswith("first difference: None\n")
