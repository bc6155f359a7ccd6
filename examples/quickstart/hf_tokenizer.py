"""A Hugging Face tokenizer folder made from a sentencepiece model, in the published layout of Mixtral-8x7B-v0.1.

    python examples/quickstart/hf_tokenizer.py --output-dir DIR

Examples and tests need a model folder that `transformers` can load without a download. The `tokenizer.json` written
here gives the ids of the sentencepiece model (a test compares them on real documents):

- normalizer: `▁` before a text that is not empty, then every space becomes `▁`; no pre-tokenizer
- BPE with byte fallback; the merges follow from the pieces, in the order in which sentencepiece would apply them
- decoder: `▁` to space, byte pieces to characters, joined, without the first space; `<s>` before a text by template
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import DataError
from megatron_mixtral.tokenizer import mixtral_tokenizer_path

METASPACE = "\u2581"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the tokenizer of mistral-common as a Hugging Face folder.")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    write_hf_tokenizer(parser.parse_args(argv).output_dir)
    return 0


def write_hf_tokenizer(directory: str | Path, model: str | Path | None = None) -> None:
    """Write tokenizer.model, tokenizer.json, tokenizer_config.json and special_tokens_map.json into `directory`.

    `model` is a sentencepiece BPE model with byte pieces and without text normalization, as those of Llama and
    Mixtral are; None takes the Mixtral tokenizer of the mistral-common package. A missing directory is made.

    Raises:
        ConfigError: no model was given and mistral-common is not installed.
        DataError: the file is no such model.
    """
    import sentencepiece

    source = Path(model) if model is not None else mixtral_tokenizer_path()
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(source))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{source} is not a sentencepiece model: {error}") from error
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    build_tokenizer(pieces, source).save(str(target / "tokenizer.json"))
    shutil.copyfile(source, target / "tokenizer.model")
    specials = [pieces.id_to_piece(i) for i in (pieces.unk_id(), pieces.bos_id(), pieces.eos_id())]
    for name, content in (
        ("tokenizer_config.json", _tokenizer_config(pieces)),
        ("special_tokens_map.json", dict(zip(("unk_token", "bos_token", "eos_token"), specials, strict=True))),
    ):
        (target / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def build_tokenizer(pieces: Any, source: Path) -> Any:
    """The `tokenizers.Tokenizer` of a `SentencePieceProcessor`; `source` names the model in an error (`DataError`)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    ids = range(pieces.get_piece_size())
    if min(pieces.unk_id(), pieces.bos_id(), pieces.eos_id()) < 0 or sum(map(pieces.is_byte, ids)) != 256:
        raise DataError(f"{source} needs unknown, begin and end pieces and 256 byte pieces, as Llama and Mixtral have.")
    unknown, bos = pieces.id_to_piece(pieces.unk_id()), pieces.id_to_piece(pieces.bos_id())
    vocab = {pieces.id_to_piece(i): i for i in ids}
    bpe = models.BPE(vocab, merges_of(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(METASPACE), normalizers.Replace(" ", METASPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, pieces.bos_id())]
    )
    controls = sorted({pieces.unk_id(), pieces.bos_id(), pieces.eos_id()})
    tokenizer.add_special_tokens([AddedToken(pieces.id_to_piece(i), special=True, normalized=False) for i in controls])
    return tokenizer


def merges_of(pieces: Any) -> list[tuple[str, str]]:
    """The BPE merges of a `SentencePieceProcessor`, first the one that is applied first.

    sentencepiece joins the neighbours whose joint piece has the best score. So a piece gives one merge for each way to
    cut it into two pieces, and the merges are ordered by the score of the piece; those of one piece by the ids of the
    two halves, as in the published file.
    """
    ids = range(pieces.get_piece_size())
    plain = {
        pieces.id_to_piece(i): i for i in ids if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i))
    }
    ranked = []
    for piece, piece_id in plain.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in plain and right in plain:
                ranked.append((-pieces.get_score(piece_id), piece_id, plain[left], plain[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _tokenizer_config(pieces: Any) -> dict[str, Any]:
    """The settings of the published `tokenizer_config.json`: BOS before a text, no EOS, the older space handling."""
    controls = {i: pieces.id_to_piece(i) for i in (pieces.unk_id(), pieces.bos_id(), pieces.eos_id())}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): {"content": piece, **flags} for i, piece in sorted(controls.items())},
        "additional_special_tokens": [],
        "bos_token": controls[pieces.bos_id()],
        "clean_up_tokenization_spaces": False,
        "eos_token": controls[pieces.eos_id()],
        "legacy": True,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": None,
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": controls[pieces.unk_id()],
        "use_default_system_prompt": False,
    }


if __name__ == "__main__":
    sys.exit(main())
