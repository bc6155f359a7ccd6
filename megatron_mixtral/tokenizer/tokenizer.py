"""The text tokenizer of preprocessing: text to ids, by sentencepiece or by the `tokenizers` library, nothing else.

Two rules hold for every tokenizer here:

- **Text is text.** `<s>`, `</s>` or `<unk>` inside a document are encoded as ordinary characters, never as control ids.
- **Nothing is added.** `encode` gives the ids of the text alone; BOS and EOS are the caller's choice (`encode.py`).

`tokenizer.json` is read with `tokenizers.Tokenizer.from_file`. `transformers.AutoTokenizer` is not used: its release 5
replaces the normalizer of Llama-like tokenizers, which changes the ids of documents that begin with white space.
"""

import hashlib
import importlib.util
import json
import logging
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

HF_TYPES = ("PretrainedTokenizerFromHF", "PretrainedFromHF", "HuggingFaceTokenizer")
SENTENCEPIECE_TYPES = ("Llama2Tokenizer",)
TOKENIZER_TYPES = HF_TYPES + SENTENCEPIECE_TYPES

# Strings on which tokenizers that only look alike give different ids: leading and inner runs of white space, control
# strings, the metaspace character itself, byte fallback, composed and decomposed letters, long runs.
NASTY_STRINGS = (
    "", " ", "  ", "   a", "a  b   c    d", "\n", "\n\n\n", "\t\tx\t", "\r\n", " \n \n", " " * 77, "a" * 50, "\x00",
    "a\x00b", "<s>", "a</s>b", "<unk>", "[INST] x [/INST]", "<0x0A>", "\u2581", "\u2581\u2581a \u2581", "\ufeffx",
    "\u00a0x\u3000y",
    "e\u0301 \u00e9", "\ufb01 \u2460 \uff21", "\u4f60\u597d\uff0c\u4e16\u754c", "\U00020000\U0001f600",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\ud7ff\ue000\uffff", "\x7f\x80\xff", "\u2028\u2029\x85\x0b\x0c",
    "0123456789 1,234.5e-10", "def f(x):\n    return x  # \u2192\n",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
)  # fmt: skip


class _TokenizerFile:
    """What both kinds have: `kind` (the library that reads it), `name`, `path`, `sha256` (hex digest of the file),
    `vocab_size`, `bos_id` and `eos_id` (None if absent), and the library's `_model`, read when it is first needed.
    """

    kind: str

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self.name = f"{self.kind}:{self.path.name}"

    def __getstate__(self) -> dict[str, Any]:
        """What goes to another process: there the file is read again, but only if the tokenizer encodes."""
        return {name: value for name, value in self.__dict__.items()
                if name not in ("_model", "_with_controls")}


class SentencePieceTokenizer(_TokenizerFile):
    """A sentencepiece `tokenizer.model`, with the control tokens that `tokenizer_config.json` beside it adds: in the
    place of an unused piece (InternLM2's `<|im_end|>`), or behind the last one.
    """

    kind = "sentencepiece"

    def __init__(self, path: str | Path) -> None:
        """Raises `DataError` when the file is no sentencepiece model."""
        super().__init__(path)
        self.vocab_size: int = max([self._model.get_piece_size() - 1, *self._added.values()]) + 1
        self.bos_id = _id_or_none(self._model.bos_id())
        self.eos_id = _id_or_none(self._model.eos_id())

    @cached_property
    def _model(self) -> Any:
        import sentencepiece

        try:
            return sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{self.path} is not a sentencepiece model: {error}") from error

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        added = set(self._added.values())  # control pieces of the file itself are left out by sentencepiece
        return self._model.decode([int(i) for i in ids if int(i) not in added])

    def encode_aside(self, text: str, controls: bool = False) -> list[int]:
        """As `encode`, or `encode_with_controls`: here too other threads go on meanwhile."""
        return self.encode_with_controls(text) if controls else self.encode(text)

    def encode_with_controls(self, text: str) -> list[int]:
        """As `encode`, but control strings in the text become control ids, and what is between two is encoded alone."""
        controls = self.control_tokens()
        parts = re.split(f"({'|'.join(map(re.escape, controls))})", text)
        return [number for part in parts for number in ([controls[part]] if part in controls else self.encode(part))]

    def control_tokens(self) -> dict[str, int]:
        """The control pieces as they are written, such as `<s>`, with their ids; `encode` takes them for text."""
        return dict(self._controls)

    def controls_take_spaces(self) -> bool:
        """Whether white space around a control string becomes part of it."""
        return False

    @cached_property
    def _controls(self) -> dict[str, int]:
        ids = [i for i in range(self._model.get_piece_size()) if self._model.is_control(i) or self._model.is_unknown(i)]
        return {self._model.id_to_piece(i): i for i in ids} | self._added

    @cached_property
    def _added(self) -> dict[str, int]:
        """Name -> id of the control tokens that `tokenizer_config.json` adds. Raises `DataError`."""
        path, found = self.path.parent / "tokenizer_config.json", {}
        for number, token in (read_settings(path).get("added_tokens_decoder") or {}).items():
            try:
                token_id, name, special = int(number), str(token["content"]), bool(token.get("special"))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise DataError(f"{path}: added_tokens_decoder has {number!r}: {token!r}, expected an id and an object "
                                "with content and special") from error
            if special and token_id >= 0 and self._model.piece_to_id(name) != token_id:
                found[name] = token_id
        return found

    def serialized(self) -> bytes:
        """The model as sentencepiece's own protocol buffer."""
        return self._model.serialized_model_proto()

    def control_id(self, token: str) -> int | None:
        """The id of a control token (which text never becomes); None where there is none of this name."""
        token_id = self._added.get(token, self._model.piece_to_id(token))
        return token_id if token in self._added or self._model.is_control(token_id) else None


class JsonTokenizer(_TokenizerFile):
    """A `tokenizer.json`, by the `tokenizers` library.

    `bos_token` and `eos_token` come from `tokenizer_config.json` or `special_tokens_map.json` beside the file, else
    they are `<s>` and `</s>` where the vocabulary has them. `vocab_size` is the largest id plus one, with added tokens.
    """

    kind = "tokenizers"

    def __init__(self, path: str | Path) -> None:
        """Raises `DataError` when the file is no tokenizer, or one whose ids are random (BPE dropout)."""
        super().__init__(path)
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        added = self._model.get_added_tokens_decoder()
        self._controls = {token.content: number for number, token in added.items() if token.special}
        declared = declared_specials(self.path.parent)
        self.bos_id = self._special_id(declared, "bos_token", "<s>")
        self.eos_id = self._special_id(declared, "eos_token", "</s>")

    @cached_property
    def _model(self) -> Any:
        import tokenizers

        try:
            model = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{self.path} is not a tokenizer.json: {error}") from error
        if getattr(model.model, "dropout", None):
            raise DataError(f"{self.path} has BPE dropout, so its ids are random: set model.dropout to null.")
        model.no_padding()
        model.no_truncation()
        model.encode_special_tokens = True  # "</s>" in a document is text, not the end of the document
        return model

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_with_controls(self, text: str) -> list[int]:
        """As `encode`, but control strings in the text become control ids (`--allow-special-in-text`)."""
        return self._with_controls.encode(text, add_special_tokens=False).ids

    def encode_aside(self, text: str, controls: bool = False) -> list[int]:
        """As `encode`, or `encode_with_controls`, while other threads go on: the library holds them for the length of a
        text, but not for that of a batch. A batch makes threads of its own, which a fork does not survive.
        """
        model = self._with_controls if controls else self._model
        return model.encode_batch([text], add_special_tokens=False)[0].ids

    @cached_property
    def _with_controls(self) -> Any:
        """A model of its own: another thread may be using the first one, whose setting therefore stays."""
        model = type(self._model).from_str(self._model.to_str())
        model.encode_special_tokens = False
        return model

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

    def control_tokens(self) -> dict[str, int]:
        """The special tokens as they are written, such as `<s>`, with their ids; `encode` takes them for text."""
        return dict(self._controls)

    def controls_take_spaces(self) -> bool:
        """Whether white space around a control string becomes part of it."""
        return any(one.lstrip or one.rstrip for one in self._model.get_added_tokens_decoder().values())

    def serialized(self) -> str:
        """The tokenizer as JSON, in the form of the library's present release, whatever the form of the file."""
        return self._model.to_str()

    def control_id(self, token: str) -> int | None:
        """The id of a control token (which text never becomes); None where there is none of this name."""
        return self._controls.get(token)

    def _special_id(self, declared: dict[str, str | None], key: str, usual: str) -> int | None:
        token = declared.get(key, usual)
        token_id = None if token is None else self._model.token_to_id(token)
        if token_id is None and declared.get(key) is not None:
            raise DataError(f"{self.path.parent} declares {key} {token!r}, which {self.path.name} does not contain.")
        return token_id


Tokenizer = SentencePieceTokenizer | JsonTokenizer


def load_tokenizer(tokenizer_type: str, path: str | Path) -> Tokenizer:
    """The tokenizer of `--tokenizer-type` from a file, or a directory that holds `tokenizer.json`/`tokenizer.model`.

    In a directory that holds both, the two must agree on `NASTY_STRINGS`; then `tokenizer.json` is used.

    Raises:
        ConfigError: an unknown type, or a path that does not exist.
        DataError: a directory without a tokenizer, an unreadable file, or two tokenizers that disagree.
    """
    path = Path(path)
    if tokenizer_type not in TOKENIZER_TYPES:
        raise ConfigError(f"--tokenizer-type {tokenizer_type} is not one of: {', '.join(TOKENIZER_TYPES)}.")
    if not path.exists():
        raise ConfigError(
            f"--tokenizer-model {path} does not exist. Give a directory that holds tokenizer.json or tokenizer.model, "
            f"or one of these files; the name of a repository on the Hugging Face hub is not looked up."
        )
    is_sentencepiece = tokenizer_type in SENTENCEPIECE_TYPES
    if path.is_file():
        if is_sentencepiece and path.suffix == ".json":
            raise ConfigError(f"--tokenizer-type {tokenizer_type} needs a sentencepiece tokenizer.model, not {path}.")
        return open_tokenizer(path)
    model, as_json = path / "tokenizer.model", path / "tokenizer.json"
    if is_sentencepiece and not model.is_file():
        raise DataError(f"{tokenizer_type} needs a sentencepiece tokenizer.model; {path} holds {_listing(path)}.")
    if not as_json.is_file() and not model.is_file():
        raise DataError(f"{path} holds neither tokenizer.json nor tokenizer.model, but {_listing(path)}.")
    if is_sentencepiece or not as_json.is_file():
        return SentencePieceTokenizer(model)
    chosen = JsonTokenizer(as_json)
    if model.is_file():
        check_agreement(chosen, SentencePieceTokenizer(model))
    return chosen


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of one file: `tokenizers` for a name that ends in `.json`, sentencepiece for any other name."""
    return JsonTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def check_agreement(first: Tokenizer, second: Tokenizer) -> None:
    """Raises `DataError`, with the text and both encodings, unless the two give the same ids for `NASTY_STRINGS`."""
    for text in NASTY_STRINGS:
        ours, theirs = first.encode(text), second.encode(text)
        if ours != theirs:
            raise DataError(
                f"{first.path} and {second.path} disagree, for example on {text[:40]!r}: {ours[:12]} and {theirs[:12]}"
                f". Name the file to use instead of the directory: --tokenizer-model {second.path} or {first.path}."
            )


def mixtral_tokenizer_path() -> Path:
    """The tokenizer of Mixtral-8x7B-v0.1 (32,000 pieces), the `tokenizer.model.v1` inside the mistral-common package.

    Raises `ConfigError` naming the package where it is not installed. The package is located, not imported.
    """
    spec = importlib.util.find_spec("mistral_common")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(root) / "data" / "tokenizer.model.v1"
        if path.is_file():
            return path
    raise ConfigError(
        "No tokenizer was given, and the Mixtral tokenizer of the mistral-common package is not here. Give "
        "--tokenizer-model DIRECTORY, or install it: pip install mistral-common."
    )


def declared_specials(directory: Path) -> dict[str, str | None]:
    """`bos_token`, `eos_token` and their like, as declared beside `tokenizer.json`; what no file declares is absent.

    Raises `DataError` for a file that is no JSON.
    """
    declared: dict[str, str | None] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = read_settings(directory / name)
        for key in [key for key in content if key.endswith("_token") and key not in declared]:
            value = content[key]["content"] if isinstance(content[key], dict) else content[key]
            if value is None or isinstance(value, str):
                declared[key] = value
    return declared


def read_settings(path: Path) -> dict[str, Any]:
    """The object of a JSON file; an empty one where there is no file. Raises `DataError` for a file that is no JSON."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _id_or_none(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None


def _listing(directory: Path) -> str:
    names = sorted(entry.name for entry in directory.iterdir())
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "nothing"
