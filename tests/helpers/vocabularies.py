"""Small vocabularies for tests, each trained or edited in a second, with features that the published ones lack."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from helpers.corpus import python_sources

README_ZH = Path(__file__).resolve().parents[2] / "README_zh.md"


def train_sentencepiece(path: Path, **options: Any) -> Path:
    """A sentencepiece BPE model of 1,000 pieces in Llama's settings, which `options` change."""
    settings = {
        "model_type": "bpe", "vocab_size": 1000, "byte_fallback": True, "character_coverage": 0.995,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "num_threads": 1, "minloglevel": 2,
        **options,
    }  # fmt: skip
    lines = [line for text in (*python_sources(40), README_ZH.read_text("utf-8")) for line in text.split("\n") if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    path.write_bytes(model.getvalue())
    return path


def edit_model(source: Path, target: Path, change: Callable[[Any], None]) -> Path:
    """A copy of a sentencepiece model whose protocol buffer `change` has edited."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(source.read_bytes())
    change(proto)
    target.write_bytes(proto.SerializeToString())
    return target


def edit_json(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a tokenizer.json whose content `change` has edited."""
    content = json.loads(source.read_text("utf-8"))
    change(content)
    target.write_text(json.dumps(content), "utf-8")
    return target
