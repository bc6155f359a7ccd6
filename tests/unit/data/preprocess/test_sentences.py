"""--split-sentences: sequences and documents as Megatron-LM's tool makes them, with the engine's builder as the oracle.

Punkt's published parameters cannot be downloaded here, so the test trains Punkt on a text of its own and stores the
parameters where nltk looks for them.
"""

import sys
from pathlib import Path

import nltk
import pytest
import sentencepiece
import torch
from helpers.corpus import python_sources, write_jsonl
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from nltk.tokenize import punkt

from megatron_mixtral.data.cli import Options
from megatron_mixtral.data.preprocess.run import preprocess
from megatron_mixtral.data.preprocess.sentences import LONGEST_PIECE, SentenceRule, open_splitter
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.tokenizer.tokenizer import mixtral_tokenizer_path

MODEL = str(mixtral_tokenizer_path())
TEXT = 'Mr. Smith went.  He said: "No!" Then\n\nhe left?\n\n And came. '


@pytest.fixture(autouse=True)
def punkt_data(tmp_path, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    folder = tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    trainer = punkt.PunktTrainer("Mr. Smith went home. Mr. Smith came back. It was late. Mr. Jones slept. " * 20)
    punkt.save_punkt_params(trainer.get_params(), str(folder))


def test_sentences_and_white_space():
    dropping = open_splitter(SentenceRule())(TEXT)
    assert dropping == ["Mr. Smith went.", 'He said: "No!"', "Then\n\nhe left?", "And came."]
    keeping = open_splitter(SentenceRule(keep_newlines=True))(TEXT)
    # Punkt itself drops it after a closing quote and at the end of the text.
    assert keeping == ["Mr. Smith went.  ", 'He said: "No!"', "Then\n\nhe left?\n\n ", "And came."]


def test_long_texts_are_cut_as_by_megatron():
    text = "x" * LONGEST_PIECE + "y"
    assert open_splitter(SentenceRule())(text) == ["x" * LONGEST_PIECE, "y"]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_same_bytes_as_the_engine(tmp_path, keep, bos):
    texts = [TEXT, "", " ", "One sentence", *python_sources(60, largest=4000)]
    write_jsonl(tmp_path / "in" / "0.jsonl", texts)
    rule = SentenceRule(keep_newlines=keep)
    split, pieces = open_splitter(rule), sentencepiece.SentencePieceProcessor(model_file=MODEL)
    builder = IndexedDatasetBuilder(str(tmp_path / "engine.bin"), dtype=DType.optimal_dtype(32000))
    written = 0
    for text in texts:
        encoded = [ids for ids in map(pieces.encode, split(text)) if ids]
        if encoded:
            encoded[0] = [1, *encoded[0]] if bos else encoded[0]
            encoded[-1] = [*encoded[-1], 2]
            builder.add_document(torch.tensor([i for ids in encoded for i in ids]), [len(ids) for ids in encoded])
            written += 1
    builder.finalize(str(tmp_path / "engine.idx"))
    for workers, chunk_bytes in ((1, 1 << 22), (1, 3000)):
        report = preprocess(Options((str(tmp_path / "in"),), str(tmp_path / "set"), MODEL, append_eod=True,
                                    prepend_bod=bos, workers=workers, chunk_bytes=chunk_bytes, sentences=rule))
        for end in (".bin", ".idx"):
            assert Path(f"{tmp_path}/set_text_sentence{end}").read_bytes() == (tmp_path / f"engine{end}").read_bytes()
    counts = report["keys"]["text"]
    assert (counts["documents"], counts["empty"]) == (written, len(texts) - written)
    assert counts["sequences"] > 2 * written


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no Punkt parameters for --lang german.*punkt_tab/german"):
        open_splitter(SentenceRule("german"))
    monkeypatch.setitem(sys.modules, "nltk.tokenize", None)
    with pytest.raises(ConfigError, match="pip install nltk"):
        open_splitter(SentenceRule())
