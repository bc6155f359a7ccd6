"""The text tokenizer: ids of the published Mixtral tokenizer, text that stays text, clear refusals."""

import json
import random
import subprocess
import sys

import pytest
import sentencepiece
from helpers.corpus import python_sources

from examples.quickstart.hf_tokenizer import write_hf_tokenizer
from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.tokenizer.tokenizer import (
    NASTY_STRINGS,
    JsonTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    mixtral_tokenizer_path,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    write_hf_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def reference():
    return sentencepiece.SentencePieceProcessor(model_file=str(mixtral_tokenizer_path()))


def random_strings(count):
    generator = random.Random(7)
    likely = [" ", "  ", "\n", "\t", "\u2581", "a", "e", "the", "</s>", "<s>", "<unk>", "\u4f60", "\u00e9"]
    ranges = [(0x00, 0x7F), (0x80, 0x2FFF), (0x3000, 0xD7FF), (0xE000, 0x10FFFF)]
    for _ in range(count):
        yield "".join(
            generator.choice(likely) if generator.random() < 0.6 else chr(generator.randint(*generator.choice(ranges)))
            for _ in range(generator.randrange(40))
        )


def test_written_json_gives_the_ids_of_sentencepiece(folder, reference):
    tokenizer = load_tokenizer("PretrainedFromHF", folder)
    assert tokenizer.kind == "tokenizers"
    for text in [*python_sources(300), *NASTY_STRINGS, *random_strings(3000)]:
        assert tokenizer.encode(text) == reference.encode(text), ascii(text[:80])


def test_properties(folder):
    model, as_json = SentencePieceTokenizer(folder / "tokenizer.model"), JsonTokenizer(folder / "tokenizer.json")
    for tokenizer in (model, as_json):
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
        text = "  tab\tand \u4f60\u597d \U0001f600\n"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode([1, *tokenizer.encode("a b"), 2]) == "a b"
        assert len(tokenizer.sha256) == 64
    assert model.sha256 != as_json.sha256


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_control_strings_in_text_are_text(folder, name):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", folder / name)
    for text in ("</s>", "a</s>b", "<s> <unk>", "</s></s>"):
        assert not {0, 1, 2}.intersection(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_types_and_places(folder, tmp_path):
    assert load_tokenizer("Llama2Tokenizer", folder).kind == "sentencepiece"
    assert load_tokenizer("Llama2Tokenizer", mixtral_tokenizer_path()).kind == "sentencepiece"
    only_model = tmp_path / "only"
    only_model.mkdir()
    (only_model / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    assert load_tokenizer("PretrainedTokenizerFromHF", only_model).kind == "sentencepiece"


def test_refusals(folder, tmp_path):
    with pytest.raises(ConfigError, match="not one of"):
        load_tokenizer("GPT2BPETokenizer", folder)
    with pytest.raises(ConfigError, match="hub is not looked up"):
        load_tokenizer("PretrainedFromHF", "mistralai/Mixtral-8x7B-v0.1")
    with pytest.raises(DataError, match="holds neither tokenizer.json nor tokenizer.model"):
        load_tokenizer("PretrainedFromHF", tmp_path)
    with pytest.raises(ConfigError, match="needs a sentencepiece"):
        load_tokenizer("Llama2Tokenizer", folder / "tokenizer.json")
    for name, words in (("tokenizer.model", "not a sentencepiece model"), ("tokenizer.json", "not a tokenizer.json")):
        (tmp_path / name).write_text("nonsense")
        with pytest.raises(DataError, match=words):
            load_tokenizer("HuggingFaceTokenizer", tmp_path / name)


def test_disagreement_in_one_folder_is_refused(folder, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    with pytest.raises(DataError, match="disagree.*Name the file"):
        load_tokenizer("PretrainedFromHF", tmp_path)
    assert load_tokenizer("PretrainedFromHF", tmp_path / "tokenizer.json").vocab_size == 32000


def test_dropout_is_refused(folder, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.1
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="dropout"):
        JsonTokenizer(tmp_path / "tokenizer.json")


def test_declared_tokens(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": None, "eos_token": {"content": "<s>"}}))
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)
    config.write_text(json.dumps({"eos_token": "<|end|>"}))
    with pytest.raises(DataError, match="declares eos_token"):
        JsonTokenizer(tmp_path / "tokenizer.json")


def test_padding_truncation_and_bos_of_the_file_are_off(folder, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
                          "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = "one two three four five six seven"
    changed, plain = JsonTokenizer(tmp_path / "tokenizer.json"), JsonTokenizer(folder / "tokenizer.json")
    assert changed.encode(text) == plain.encode(text)


def test_transformers_loads_the_folder(folder):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (32000, 1, 2)
    ids = tokenizer("A short text, 1234.").input_ids
    assert ids[0] == 1 and ids[1:] == load_tokenizer("PretrainedFromHF", folder).encode("A short text, 1234.")


def test_no_heavy_import():
    code = (
        "import sys, megatron_mixtral.data.cli as p, examples.quickstart.hf_tokenizer\n"
        "from megatron_mixtral.tokenizer.tokenizer import load_tokenizer, mixtral_tokenizer_path\n"
        "load_tokenizer('Llama2Tokenizer', mixtral_tokenizer_path())\n"
        "print([m for m in ('torch', 'transformers', 'megatron', 'mistral_common') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
