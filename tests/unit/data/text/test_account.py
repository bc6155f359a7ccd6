"""The account of a run on plain text does not add up where an input or a part is not what it was: it writes nothing."""

from pathlib import Path

import pytest
from helpers.corpus import write_jsonl

from megatron_mixtral.data.indexed import IndexedWriter
from megatron_mixtral.data.text import TextOptions, preprocess_text
from megatron_mixtral.data.text.assemble import Assembly
from megatron_mixtral.errors import DataError
from megatron_mixtral.tokenizer import mixtral_tokenizer_path


def preprocess(tmp_path: Path, path: Path) -> None:
    preprocess_text(TextOptions((str(path),), str(tmp_path / "out" / "set"), str(mixtral_tokenizer_path()),
                                append_eod=True, tokenizer_type="Llama2Tokenizer", chunk_bytes=1000))


def test_an_input_rewritten_in_place_is_noticed(tmp_path, monkeypatch):
    """Of the same size, after it was read."""
    path = write_jsonl(tmp_path / "x.jsonl", ["a"] * 5)
    real = Assembly.collect

    def rewrite_after_reading(self, results):
        real(self, results)
        path.write_bytes(path.read_bytes().replace(b"a", b"b"))

    monkeypatch.setattr(Assembly, "collect", rewrite_after_reading)
    with pytest.raises(DataError, match="x.jsonl has changed while it was read"):
        preprocess(tmp_path, path)
    assert sorted(tmp_path.glob("out/set*")) == []


def test_a_part_that_is_not_collected_is_noticed(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "x.jsonl", ["a"] * 400)
    real, parts = IndexedWriter.add_part, []

    def forgetful(self, *paths):
        parts.append(paths)
        if len(parts) != 2:
            real(self, *paths)

    monkeypatch.setattr(IndexedWriter, "add_part", forgetful)
    with pytest.raises(DataError, match=r"400 documents and \d+ tokens were encoded, \d+ and \d+ collected"):
        preprocess(tmp_path, path)
    assert sorted(tmp_path.glob("out/set*")) == [] and len(parts) > 2
