"""Which engine encodes a run, what it must prove, and how texts with control strings are treated by each of them."""

import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from helpers.corpus import python_sources, write_jsonl
from helpers.documents import first_difference, random_texts, real_documents
from helpers.native_build import ensure_extension
from helpers.vocabularies import train_sentencepiece

from examples.quickstart.hf_tokenizer import write_hf_tokenizer
from megatron_mixtral.data import preprocess_command
from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.tokenizer.encode import ControlCounts, ControlStrings, DocumentEncoder
from megatron_mixtral.tokenizer.engines import choose, native
from megatron_mixtral.tokenizer.engines.base import EngineUnavailable, SpecialTokens, frame, token_dtype
from megatron_mixtral.tokenizer.engines.choose import choose_engine, make_engine
from megatron_mixtral.tokenizer.engines.libraries import ReferenceEngine
from megatron_mixtral.tokenizer.tokenizer import NASTY_STRINGS, open_tokenizer

FRAME = SpecialTokens(1, 2)
CONTROLS = ["<s>", "a </s> b", "</s></s>", "x<unk>y", "[INST] hello [/INST]", "<s", "plain"]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixtral")
    write_hf_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A tokenizer.json of the other family: byte-level BPE, with two special tokens, as GPT-2 or Llama-3."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<|begin|>", "<|end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    model.train_from_iterator(python_sources(60), trainer)
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    model.save(str(path))
    return path


@pytest.fixture
def extension(tmp_path_factory):
    ensure_extension(tmp_path_factory.mktemp("native"))


class WrongEngine(native.NativeEngine):
    """Right until a text has a certain word in it."""

    def encode(self, texts, specials):
        return super().encode([text.replace("zebra", "Zebra") for text in texts], specials)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_auto_takes_the_native_engine_and_proves_it(mixtral, extension, name):
    choice = choose_engine("auto", open_tokenizer(mixtral / name), ["some documents", "of the run"])
    assert choice.engine.name == "native" and not choice.declined
    reference = "tokenizers" if name.endswith("json") else "sentencepiece"
    assert choice.proof["reference"].startswith(reference + " ")
    assert choice.proof["documents"] == 2 and choice.proof["difficult_strings"] == len(NASTY_STRINGS) + 3


def test_without_the_extension_auto_takes_fastokens_and_without_that_the_reference(mixtral, monkeypatch, caplog):
    tokenizer = open_tokenizer(mixtral / "tokenizer.json")
    monkeypatch.setitem(sys.modules, native.MODULE, None)
    monkeypatch.delattr(sys.modules[native.MODULE.rpartition(".")[0]], "_native_bpe", raising=False)
    choice = choose_engine("auto", tokenizer, [])
    assert choice.engine.name == "fastokens" and "its extension is not built" in choice.declined["native"]
    assert "tokenizer engine native is not used: its extension is not built" in caplog.text
    monkeypatch.setitem(sys.modules, "fastokens", None)
    choice = choose_engine("auto", tokenizer, [])
    assert choice.engine.name == "tokenizers" and choice.proof is None
    assert set(choice.declined) == {"native", "fastokens"} and "[fast]" in choice.declined["fastokens"]
    with pytest.raises(ConfigError, match="--tokenizer-engine native cannot serve .*build_ext --inplace"):
        choose_engine("native", tokenizer, [])


def test_an_extension_of_other_sources_is_not_used(mixtral, extension, monkeypatch):
    monkeypatch.setattr(native, "fingerprint", lambda: "00000000")
    with pytest.raises(ConfigError, match="built from other sources"):
        choose_engine("native", open_tokenizer(mixtral / "tokenizer.json"), [])


def test_an_engine_with_one_wrong_id_is_not_used(mixtral, extension, monkeypatch, caplog):
    tokenizer = open_tokenizer(mixtral / "tokenizer.json")
    monkeypatch.setitem(choose.FAST, "native", WrongEngine)
    assert choose_engine("auto", tokenizer, ["a horse"]).engine.name == "native"  # nothing shows it
    choice = choose_engine("auto", tokenizer, ["a horse", "a zebra"])
    assert choice.engine.name == "fastokens"
    assert "its ids are not those of tokenizers: from token 1 of the text 'a zebra' on" in choice.declined["native"]
    assert "its ids are not those" in caplog.text
    with pytest.raises(ConfigError, match="a zebra"):
        choose_engine("native", tokenizer, ["a zebra"])


def test_an_engine_is_proved_on_difficult_strings_too(mixtral):
    """The first documents of a run may be all plain."""
    tokenizer = open_tokenizer(mixtral / "tokenizer.json")
    reference = ReferenceEngine(tokenizer)
    for difficult in (NASTY_STRINGS[0], NASTY_STRINGS[-1], "a</s> b"):
        wrong = SimpleNamespace(encode=lambda texts, specials, difficult=difficult: reference.encode(
            ["x" if text == difficult else text for text in texts], specials))
        with pytest.raises(EngineUnavailable, match="its ids are not those of tokenizers"):
            choose.prove(wrong, tokenizer, ["a horse"])
    assert choose.prove(reference, tokenizer, ["a horse"])["documents"] == 1


def test_a_named_engine_that_cannot_serve_is_an_error(mixtral, byte_level, extension):
    with pytest.raises(ConfigError, match="sentencepiece cannot serve .*tokenizer.json.*give --tokenizer-model"):
        choose_engine("sentencepiece", open_tokenizer(mixtral / "tokenizer.json"), [])
    with pytest.raises(ConfigError, match="native cannot serve .*no byte fallback"):
        choose_engine("native", open_tokenizer(byte_level), [])
    with pytest.raises(ConfigError, match="not one of: auto, native"):
        choose_engine("fastest", open_tokenizer(byte_level), [])


def test_fastokens_on_byte_level_bpe(byte_level, extension):
    tokenizer = open_tokenizer(byte_level)
    choice = choose_engine("auto", tokenizer, real_documents(50, 3000))
    assert choice.engine.name == "fastokens" and "no byte fallback" in choice.declined["native"]
    texts = [*NASTY_STRINGS, "<|end|>", "a<|begin|>b", "<|end", *random_texts(2000, tokenizer)]
    assert first_difference(choice.engine, tokenizer, [*texts, *real_documents(200, 3000)]) is None


@pytest.mark.parametrize("name", ["native", "fastokens", "tokenizers", "sentencepiece"])
def test_text_is_text(mixtral, extension, name):
    path = mixtral / ("tokenizer.model" if name == "sentencepiece" else "tokenizer.json")
    tokenizer = open_tokenizer(path)
    encoder = DocumentEncoder(tokenizer, FRAME, make_engine(name, tokenizer))
    ids, lengths = encoder.encode_documents([*CONTROLS, ""])
    assert (ids.dtype, lengths.dtype, lengths[-1]) == (np.uint16, np.int32, 0)
    expected = [[1, *tokenizer.encode(text), 2] for text in CONTROLS]
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-2])] == expected
    assert not {0, 1, 2} & {i for row in expected for i in row[1:-1]}
    assert encoder.take_control_counts().documents == 0


def test_fastokens_on_letters_that_are_younger_than_some_tables_of_letters(tmp_path):
    """Which characters are letters decides where a text is cut; another library had younger tables, and other ids."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    before = tokenizers.pre_tokenizers
    letters = before.Split(tokenizers.Regex(r" ?\p{L}+| ?[^\s\p{L}]+|\s+"), "isolated")
    model.pre_tokenizer = before.Sequence([letters, before.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=2000, show_progress=False,
                                             initial_alphabet=before.ByteLevel.alphabet())  # fmt: skip
    model.train_from_iterator(python_sources(60), trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json")
    texts = ["shot-indent\U00032f82_exitcode", "\U00033239/bin compname", *map(chr, range(0x32000, 0x33500))]
    assert first_difference(make_engine("fastokens", tokenizer), tokenizer, texts) is None


def test_gigatoken_is_refused_in_a_sentence(mixtral):
    with pytest.raises(ConfigError, match="gigatoken is gone.*fastokens"):
        choose_engine("gigatoken", open_tokenizer(mixtral / "tokenizer.json"), [])


@pytest.mark.parametrize("name", ["native", "fastokens", "tokenizers"])
def test_control_strings_are_allowed_on_demand_and_counted(mixtral, extension, name):
    tokenizer = open_tokenizer(mixtral / "tokenizer.json")
    encoder = DocumentEncoder(tokenizer, FRAME, make_engine(name, tokenizer), allow_special=True)
    ids, lengths = encoder.encode_documents(CONTROLS)
    published = tokenizers.Tokenizer.from_file(str(mixtral / "tokenizer.json"))
    expected = [[1, *published.encode(text, add_special_tokens=False).ids, 2] for text in CONTROLS]
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == expected
    counts = encoder.take_control_counts()
    assert (counts.documents, counts.tokens) == (4, 5)
    assert encoder.take_control_counts().documents == 0
    ids, lengths = encoder.encode_documents(["a</s>", "<s>b"])  # a batch with a control string in every text
    assert lengths.sum() == ids.size and encoder.take_control_counts() == ControlCounts(2, 2)


def test_control_strings_cannot_be_allowed_with_sentencepiece(mixtral):
    with pytest.raises(ConfigError, match="--allow-special-in-text needs a tokenizer.json"):
        DocumentEncoder(open_tokenizer(mixtral / "tokenizer.model"), FRAME, allow_special=True)


@pytest.mark.parametrize("name", ["native", "fastokens", "tokenizers"])
def test_an_encoder_that_was_sent_to_another_process(mixtral, extension, name):
    tokenizer = open_tokenizer(mixtral / "tokenizer.json")
    encoder = DocumentEncoder(tokenizer, FRAME, make_engine(name, tokenizer), allow_special=True)
    data = pickle.dumps(encoder)
    assert len(data) < 2_000_000
    for ours, theirs in zip(
        encoder.encode_documents(CONTROLS), pickle.loads(data).encode_documents(CONTROLS), strict=True
    ):
        assert np.array_equal(ours, theirs)


def test_frame_refuses_ids_before_they_wrap():
    pieces = [np.array([5, 65_536 + 7])]
    with pytest.raises(DataError, match="65543, outside the vocabulary of 32000"):
        frame(pieces, FRAME, 32_000)
    framed, lengths = frame(pieces, FRAME, 70_000)
    assert framed.tolist() == [1, 5, 65_543, 2] and framed.dtype == np.int32 and lengths.tolist() == [4]
    assert (token_dtype(65_499), token_dtype(65_500)) == (np.uint16, np.int32)


def test_a_text_without_ids_has_no_frame():
    framed, lengths = frame([np.array([5]), np.array([], dtype=np.int64), np.array([6, 7])], FRAME, 100)
    assert framed.tolist() == [1, 5, 2, 1, 6, 7, 2] and lengths.tolist() == [3, 0, 4]


def test_texts_with_and_without_control_strings_keep_their_order(mixtral):
    tokenizer = open_tokenizer(mixtral / "tokenizer.json")
    encoder = DocumentEncoder(tokenizer, FRAME, allow_special=True)
    texts = ["plain", "a</s>", "also plain", "", "<s>b"]
    ids, lengths = encoder.encode_documents(texts)
    alone = [encoder.encode_documents([text])[0].tolist() for text in texts]
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == alone
    assert [len(one) for one in alone] == lengths.tolist() and lengths[3] == 0


def test_control_strings_are_found():
    search = ControlStrings(["<|a|>", "<|b|>"])
    assert search.occur_in("<|a|>") and search.occur_in("x<|b|>x")
    assert not any(search.occur_in(text) for text in ("<|c|>", "<|", "a|>", ""))
    assert ControlStrings(["</s>", "[X]"]).occur_in("a[X]") and not ControlStrings([]).occur_in("a")


def run(tmp_path: Path, model: Path, *flags: str) -> tuple[dict, bytes]:
    source = tmp_path / "in.jsonl"
    if not source.exists():
        write_jsonl(source, [*python_sources(120, 4000), *NASTY_STRINGS, *CONTROLS])
    prefix = tmp_path / "-".join(["out", *flags]).replace("--", "")
    preprocess_command(["--input", str(source), "--output-prefix", str(prefix), "--tokenizer-type",
                        "HuggingFaceTokenizer", "--tokenizer-model", str(model), "--append-eod", *flags])  # fmt: skip
    report = json.loads(prefix.with_name("reports").joinpath(f"{prefix.name}.report.json").read_text())
    return report, Path(f"{prefix}_text_document.bin").read_bytes()


def test_every_engine_writes_the_same_bytes(mixtral, tmp_path, extension):
    model = mixtral / "tokenizer.json"
    report, expected = run(tmp_path, model, "--workers", "1", "--tokenizer-engine", "tokenizers")
    assert report["tokenizer"]["engine"] == "tokenizers" and report["tokenizer"]["proof"] is None
    for engine in ("native", "fastokens"):
        report, found = run(tmp_path, model, "--workers", "1", "--tokenizer-engine", engine)
        assert found == expected
        assert report["tokenizer"]["engine"] == engine
        assert report["tokenizer"]["reason"] == f"--tokenizer-engine {engine}"
        assert report["tokenizer"]["proof"]["documents"] == 100
    _, found = run(tmp_path, mixtral / "tokenizer.model", "--workers", "1", "--tokenizer-engine", "sentencepiece")
    assert found == expected


def test_the_flags_of_a_run(mixtral, tmp_path, extension):
    report, plain = run(tmp_path, mixtral / "tokenizer.json", "--workers", "1")
    assert report["keys"]["text"]["control_tokens"] == 0
    report, special = run(tmp_path, mixtral / "tokenizer.json", "--workers", "1", "--allow-special-in-text")
    counts = report["keys"]["text"]
    assert report["tokenizer"]["allow_special_in_text"] is True and special != plain
    documents = np.frombuffer(special, np.uint16)
    assert counts["control_documents"] >= 4
    # Every EOS in the file is the end of a document or was counted; so was every <s> and <unk>.
    assert np.isin(documents, [0, 1, 2]).sum() == counts["documents"] + counts["control_tokens"]
    with pytest.raises(ConfigError, match="--allow-special-in-text needs a tokenizer.json"):
        run(tmp_path, mixtral / "tokenizer.model", "--workers", "1", "--allow-special-in-text")
    with pytest.raises(ConfigError, match="--tokenizer-engine sentencepiece cannot serve"):
        run(tmp_path, mixtral / "tokenizer.json", "--tokenizer-engine", "sentencepiece")


def test_auto_on_a_model_that_native_declines(tmp_path, extension):
    path = train_sentencepiece(tmp_path / "tokenizer.model", normalization_rule_name="nmt_nfkc")
    choice = choose_engine("auto", open_tokenizer(path), real_documents(20, 2000))
    assert choice.engine.name in ("fastokens", "sentencepiece") and "normalized" in choice.declined["native"]
