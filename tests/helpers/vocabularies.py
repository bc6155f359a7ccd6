"""Small vocabularies for tests, each trained or edited in a second, with features that the published ones lack."""

import io
import json
import string
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


def write_letters(directory: Path, size: int = 96) -> Path:
    """A `tokenizer.json` with a token for each of some characters, which transformers reads, for the smallest models.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    specials = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    characters = "\n " + string.ascii_letters + string.digits + string.punctuation
    vocab = {token: number for number, token in enumerate([*specials.values(), *characters][:size])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], pair=["<s>", "$A", "$B"],
                                                             special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in specials.values()])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, **specials}))
    return directory
