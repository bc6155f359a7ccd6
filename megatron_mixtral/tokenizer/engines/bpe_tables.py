"""Tokenizer files to the tables of the native engine: characters, merges, and what can join.

Two kinds are read: a sentencepiece BPE model, and a `tokenizer.json` with a BPE model, both with byte fallback. The
engine declines, with the reason, when a file has anything that it does not do. Mixtral, Mistral, Llama-2 and their
descendants are served.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_mixtral.tokenizer.engines.base import EngineUnavailable
from megatron_mixtral.tokenizer.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer

METASPACE = "\u2581"
PREFIX_NONE, PREFIX_ALWAYS, PREFIX_UNLESS_SPACE = 0, 1, 2  # `Prefix` in native_bpe/encoder.h
NORMAL, UNKNOWN, CONTROL, DEFINED, BYTE = 1, 2, 3, 4, 6  # ModelProto.SentencePiece.Type; unused ones are declined


@dataclass(frozen=True)
class BpeTables:
    """Arrays of uint32. In `characters` and `joins` the metaspace is a space, as the engine has it in the text.

    A symbol below `vocab_size` is an id; those from there on are characters that are in merges, but are no pieces.
    """

    vocab_size: int
    characters: np.ndarray  # (n, 2): code point, symbol
    merges: np.ndarray  # (n, 4): left symbol, right symbol, rank, id of the result
    joins: np.ndarray  # (n, 2): last code point of a left symbol, first code point of a right symbol
    byte_ids: np.ndarray  # (256,)
    prefix: int
    longest: int  # the most characters of a text that one id stands for
    defined: dict[str, int] = field(default_factory=dict)  # pieces that are found in a text before any merge


def bpe_tables(tokenizer: Tokenizer) -> BpeTables:
    """Raises `EngineUnavailable` for a tokenizer that the native engine does not serve."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return sentencepiece_tables(tokenizer)
    return json_tables(tokenizer)


def sentencepiece_tables(tokenizer: SentencePieceTokenizer) -> BpeTables:
    """sentencepiece merges the neighbours whose joint piece has the best score, whatever pieces these two are."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise EngineUnavailable(f"reading a sentencepiece model needs protobuf ({error})") from error
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.serialized())
    _check_proto(proto)
    # No text has a space left when merges begin, so pieces with a space are never reached.
    pieces = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type == NORMAL and " " not in piece.piece}
    byte_ids = {piece.piece: index for index, piece in enumerate(proto.pieces) if piece.type == BYTE}
    # Equal scores are one rank: then the leftmost merge is first.
    ranks = np.unique([-piece.score for piece in proto.pieces], return_inverse=True)[1].tolist()
    only_parts: dict[str, int] = {}  # characters that are no pieces, but parts of pieces
    merges = []
    for text, index in pieces.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if (len(left) > 1 and left not in pieces) or (len(right) > 1 and right not in pieces):
                continue
            for half in (left, right):
                if half not in pieces:
                    only_parts.setdefault(half, len(proto.pieces) + len(only_parts))
            merges.append((left, right, ranks[index], index))
    characters = {text: index for text, index in pieces.items() if len(text) == 1} | only_parts
    prefix = PREFIX_ALWAYS if proto.normalizer_spec.add_dummy_prefix else PREFIX_NONE
    tables = _tables(len(proto.pieces), pieces | only_parts, characters, merges, byte_ids, prefix)
    defined = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type == DEFINED}
    return replace(tables, defined=defined, longest=max([tables.longest, *map(len, defined)]))


def json_tables(tokenizer: JsonTokenizer) -> BpeTables:
    """`tokenizers` merges the neighbours that come first in its list of merges."""
    content = json.loads(tokenizer.serialized())
    model = content["model"]
    _check_json_model(model)
    for token in content["added_tokens"]:
        if not token["special"]:
            raise EngineUnavailable(f"the added token {token['content']!r} is not special, so it is found in texts")
    prefix = _json_prefix(content["normalizer"], content["pre_tokenizer"])
    vocab: dict[str, int] = model["vocab"]
    # No text has a space left when merges begin, so pieces with a space are never reached.
    characters = {text: index for text, index in vocab.items() if len(text) == 1 and text != " "}
    byte_ids = {text: vocab[text] for text in map("<0x{:02X}>".format, range(256)) if text in vocab}
    is_reachable = frozenset(characters).issuperset  # a merge of any other character is not
    merges = []
    for rank, (left, right) in enumerate(model["merges"]):
        if left in byte_ids or right in byte_ids:
            raise EngineUnavailable(f"it merges the byte pieces {left} and {right}")
        both = left + right
        if is_reachable(both):
            merges.append((left, right, rank, vocab[both]))
    return _tables(tokenizer.vocab_size, vocab, characters, merges, byte_ids, prefix)


def _tables(
    vocab_size: int,
    symbols: dict[str, int],
    characters: dict[str, int],
    merges: Sequence[tuple[str, str, int, int]],
    byte_ids: dict[str, int],
    prefix: int,
) -> BpeTables:
    if len(byte_ids) != 256:
        raise EngineUnavailable(f"the vocabulary has {len(byte_ids)} byte pieces, <0x00> to <0xFF>, instead of 256")
    if METASPACE not in characters:
        raise EngineUnavailable("the vocabulary has no piece for the space, U+2581")
    lefts, rights, ranks, results = zip(*merges, strict=True) if merges else ([], [], [], [])
    joins = sorted({(left[-1], right[0]) for left, right in zip(lefts, rights, strict=True)})
    return BpeTables(
        vocab_size=vocab_size,
        characters=_table([_code(text) for text in characters], list(characters.values())),
        merges=_table([symbols[left] for left in lefts], [symbols[right] for right in rights], ranks, results),
        joins=_table([_code(left) for left, _ in joins], [_code(right) for _, right in joins]),
        byte_ids=_table([byte_ids[f"<0x{byte:02X}>"] for byte in range(256)]).reshape(-1),
        prefix=prefix,
        longest=max(map(len, symbols)),
    )


def _code(character: str) -> int:
    return ord(" " if character == METASPACE else character)


def _table(*columns: Sequence[int]) -> np.ndarray:
    return np.ascontiguousarray(np.array([np.array(column, dtype=np.uint32) for column in columns]).T)


def _check_proto(proto: Any) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    for wanted, reason in (
        (trainer.model_type == trainer.BPE, "the sentencepiece model is not BPE"),
        (trainer.byte_fallback, "the sentencepiece model has no byte fallback"),
        (not trainer.treat_whitespace_as_suffix, "white space is a suffix (treat_whitespace_as_suffix)"),
        (not normalizer.precompiled_charsmap, f"the text is normalized ({normalizer.name})"),
        (not normalizer.remove_extra_whitespaces, "white space is removed (remove_extra_whitespaces)"),
        (normalizer.escape_whitespaces, "spaces are not escaped (escape_whitespaces is off)"),
    ):
        if not wanted:
            raise EngineUnavailable(reason)
    for piece in proto.pieces:
        if piece.type not in (NORMAL, UNKNOWN, CONTROL, DEFINED, BYTE):
            raise EngineUnavailable(f"the piece {piece.piece!r} is unused")
        if piece.type == DEFINED and {" ", METASPACE} & set(piece.piece):
            raise EngineUnavailable(f"the user-defined piece {piece.piece!r} has a space in it")
        if piece.type not in (NORMAL, DEFINED) and len(piece.piece) == 1:
            raise EngineUnavailable(f"the control piece {piece.piece!r} is a single character")


def _check_json_model(model: dict[str, Any]) -> None:
    if model.get("type") != "BPE":
        raise EngineUnavailable(f"the model of the tokenizer is {model.get('type')}, not BPE")
    if not model.get("byte_fallback"):
        raise EngineUnavailable("the model has no byte fallback")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(name):
            raise EngineUnavailable(f"the model has {name} = {model[name]!r}")


def _json_prefix(normalizer: dict[str, Any] | None, pre_tokenizer: dict[str, Any] | None) -> int:
    """What the normalizer or the pre-tokenizer puts before a text; both of them must not do anything else."""
    if normalizer is None and pre_tokenizer is not None and pre_tokenizer["type"] == "Metaspace":
        schemes = {"always": PREFIX_UNLESS_SPACE, "first": PREFIX_UNLESS_SPACE, "never": PREFIX_NONE}
        if pre_tokenizer["replacement"] == METASPACE and not pre_tokenizer["split"]:
            return schemes[pre_tokenizer["prepend_scheme"]]
    if normalizer is not None and pre_tokenizer is None:
        steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        prepend = {"type": "Prepend", "prepend": METASPACE}
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": METASPACE}
        if sorted(steps, key=str) == sorted([prepend, replace], key=str):
            return PREFIX_ALWAYS
        if steps == [replace]:
            return PREFIX_NONE
    raise EngineUnavailable(
        f"normalizer {json.dumps(normalizer)[:200]} with pre_tokenizer {json.dumps(pre_tokenizer)[:200]} is neither "
        f"Prepend and Replace of spaces nor Metaspace without split"
    )
