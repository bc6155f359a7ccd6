"""Which data sets a run reads, with which weights, and whether the model can read them. Standard library and numpy.

Training asks before the engine is imported; `pretraining.py` builds what was asked for.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_mixtral.data.indexed import IndexFile
from megatron_mixtral.errors import ConfigError, DataError

Blend = tuple[list[str], list[float] | None]
SPLIT = "969,30,1"  # the engine's own, where none is given
DOCUMENTS_CHECKED = 64  # of each data set, for its vocabulary: a wrong tokenizer shows at once


def blend_of(words: Sequence[str] | None, endings: Sequence[str] = ("",)) -> Blend | None:
    """`--data-path` as (prefixes, weights or None), read as the engine reads it: `0.6 A 0.4 B`, or `A B`.

    Each prefix stands for the pairs `{prefix}{ending}.bin` and `.idx`. `DataError` where a file of a pair is missing,
    or only some prefixes have a weight.
    """
    if not words:
        return None
    weights = [_number(word) for word in words[::2]]
    if len(words) % 2 or not any(weight is not None for weight in weights):
        prefixes, weights = [word.strip() for word in words], None
    elif None in weights:
        raise DataError(f"--data-path {' '.join(words)}: expected a weight before every prefix, or before none; "
                        f"{words[2 * weights.index(None)]} stands where a weight should be")
    else:
        prefixes = [word.strip() for word in words[1::2]]
    for prefix in prefixes:
        for ending in endings:
            _check_pair(prefix, ending)
    if weights is not None and any(weight < 0 for weight in weights):
        raise DataError(f"--data-path: negative weight in {weights}")
    return prefixes, weights


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _check_pair(prefix: str, ending: str) -> None:
    for suffix in (".bin", ".idx"):
        if not Path(prefix + ending + suffix).is_file():
            hint = ""
            if Path(f"{prefix}_text_document.idx").is_file():
                hint = f"; did you mean {prefix}_text_document?"
            elif Path(f"{prefix}_packed_input_ids_document.idx").is_file() and not ending:
                hint = "; instruction data is read with --is-instruction-dataset"
            raise DataError(f"--data-path: {prefix}{ending}{suffix} does not exist (a data set is named by its prefix, "
                            f"without .bin or .idx){hint}")


def sizes_of(split: str | None) -> tuple[float, float, float]:
    """The sizes of training, validation and test set in `--split 98,1,1`, read as the engine reads it, which stops with
    a traceback where there are more. `ConfigError` where there is none.
    """
    try:
        sizes = [float(word) for word in re.findall(r"[.0-9]+", split or SPLIT)]
    except ValueError:  # 1.2.3
        sizes = []
    if len(sizes) > 3 or not sum(sizes):
        raise ConfigError(f"--split {split}: expected the sizes of three parts, such as 98,1,1, one of them above 0")
    training, validation, test = [*sizes, 0.0, 0.0][:3]
    return training, validation, test


def prefixes_of(blends: Iterable[Blend | None]) -> list[str]:
    """The data sets of some blends, each once."""
    return list(dict.fromkeys(prefix for blend in blends if blend is not None for prefix in blend[0]))


def check_pretraining(blends: Iterable[Blend | None], vocab_size: int, seq_length: int) -> None:
    """`DataError` for a data set that is not whole, is too short for one sample, or whose first documents hold a token
    the model has no row for.
    """
    for prefix in prefixes_of(blends):
        index = IndexFile(prefix)
        if index.tokens < seq_length + 1:
            raise DataError(f"{prefix}: {index.tokens} tokens in {len(index)} documents; one sample needs "
                            f"{seq_length + 1} (--seq-length + 1): give more text")
        for number in range(min(DOCUMENTS_CHECKED, len(index))):
            largest = int(index.sequence(number).max(initial=0))
            if largest >= vocab_size:
                raise DataError(f"{prefix}: document {number} holds token {largest}, the model's vocabulary has "
                                f"{vocab_size}; it was written with another tokenizer")
