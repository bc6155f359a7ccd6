"""Perplexity: how probable a model finds the tokens of texts, of data sets, and of what a run validates on.

What is scored is a passage: ids, of which each but the first has a probability; of instruction data those that are
trained count. Long ones are read in windows, as in the guide of transformers
(huggingface.co/docs/transformers/perplexity), so the two may be compared.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched, chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_mixtral.data.corpus import BadRecord, LineCounts, cut_chunks, lines_before, list_inputs, read_records
from megatron_mixtral.data.datasets import InstructionFiles, blend_of, instruction_blend
from megatron_mixtral.data.indexed import IndexFile
from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.inference import Generator, ScoringParams
from megatron_mixtral.tokenizer import Tokenizer, chat

logger = logging.getLogger(__name__)

_AT_A_TIME = 32  # windows, whose results are held together
_SAY_EVERY = 30.0  # seconds
_CHUNK_BYTES = 4 << 20


class Passage(NamedTuple):
    """Ids, of which all but the first are scored, and the bytes of the text of those (None: they are no text).
    `trained` says of each id whether it counts (None: every one).
    """

    ids: Sequence[int]
    size: int | None
    trained: Sequence[bool] | None = None


@dataclass
class Figures:
    """Sums over passages: `nats` is minus the sum of the natural logarithms of the probabilities of `tokens`."""

    passages: int = 0
    tokens: int = 0
    nats: float = 0.0
    size: int | None = 0

    def add(self, other: "Figures") -> None:
        """Take in those of other passages."""
        self.passages, self.tokens = self.passages + other.passages, self.tokens + other.tokens
        self.nats += other.nats
        self.size = None if self.size is None or other.size is None else self.size + other.size

    def report(self, name: str) -> dict[str, Any]:
        """`loss` in nats a token, as training logs it; `perplexity` its exponential; of text the same by byte. `name`
        is what a `DataError` calls passages without a token.
        """
        if not self.tokens:
            raise DataError(f"{name} holds nothing to score: expected a text of at least one token, of two where the "
                            "tokenizer has no BOS; of instruction data one that is trained")
        loss = self.nats / self.tokens
        found = {"passages": self.passages, "tokens": self.tokens, "loss": loss, "perplexity": _exp(loss)}
        if self.size:
            found |= {"bytes": self.size, "bits_per_byte": self.nats / math.log(2) / self.size,
                      "byte_perplexity": _exp(self.nats / self.size)}
        return found


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def documents(prefix: str, tokenizer: Tokenizer | None) -> Iterator[Passage]:
    """Every document of `PREFIX.bin/.idx`, behind one BOS where the tokenizer has one. `DataError` as `IndexFile`."""
    index = IndexFile(prefix)
    for first, end in pairwise(index.documents.tolist()):
        ids = np.concatenate([index.sequence(number) for number in range(first, end)]).tolist() if end > first else []
        ids = _after_bos(ids, tokenizer)
        yield Passage(ids, None if tokenizer is None else _bytes(ids, tokenizer) - _bytes(ids[:1], tokenizer))


def instructions(prefix: str) -> Iterator[Passage]:
    """Every sample of an instruction set, of which the trained tokens count. `DataError` as `InstructionFiles`."""
    files = InstructionFiles(prefix)
    for number in range(len(files)):
        for ids, labels in files.row(number):
            yield Passage(ids.tolist(), None, (labels != chat.IGNORED).tolist())


def check_inputs(inputs: Sequence[str]) -> None:
    """`ConfigError` or `DataError` for files that are missing or not to be read, as far as it shows without reading all
    of what are not single texts.
    """
    for path in inputs:
        if inputs.count(path) > 1:
            raise ConfigError(f"--input names {path} twice")
        if not Path(path).exists():
            raise ConfigError(f"--input {path} does not exist")
        if path.endswith(".txt") and not _whole(path):
            raise DataError(f"{path} is empty: there is nothing to score")
    if others := [path for path in inputs if not path.endswith(".txt")]:
        list_inputs(others)


def texts(path: str, key: str, tokenizer: Tokenizer) -> Iterator[Passage]:
    """A `.txt` file as one text; of any other, the texts of `key`, as preprocessing reads them. `DataError`, with the
    line, for what cannot be read.
    """
    for text in [_whole(path)] if path.endswith(".txt") else _records(path, key):
        ids = _after_bos(tokenizer.encode(text), tokenizer)
        size = len(text.encode())
        yield Passage(ids, size if ids[:1] == [tokenizer.bos_id] else size - _bytes(ids[:1], tokenizer))


def _whole(path: str) -> str:
    try:
        return Path(path).read_bytes().decode()  # with its own line ends
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _records(path: str, key: str) -> Iterator[str]:
    for chunk in cut_chunks(list_inputs([path]).files, _CHUNK_BYTES):
        counts = LineCounts()
        for found in read_records(chunk, (key,), counts):
            if isinstance(found, BadRecord):
                raise DataError(f"{chunk.file.path}, line {lines_before(chunk) + counts.lines}: "
                                + str(found).replace("--json-keys", "--json-key"))
            yield from filter(None, found[0])


def validation_samples(data_path: Sequence[str], *, instruction: bool, seq_length: int, split: str, seed: int,
                       count: int | None, cache: str | None, vocab_size: int) -> Iterator[Passage]:
    """What a run with these flags validates on, by training's own builder: `count` samples of `seq_length` tokens, of
    `instruction` data rows, or those of one epoch. Every rank calls it, after the process group is there.

    A run reads them in this order, samples of plain text as long as its evaluations together need no second epoch.
    """
    from megatron.core.tokenizers import MegatronTokenizer

    from megatron_mixtral.data.datasets import build_instruction, build_pretraining

    common = {"seq_length": seq_length, "seed": seed, "blend_per_split": None, "split": split, "cache": cache,
              "is_built_on_rank": lambda: True, "tokenizer": MegatronTokenizer.from_pretrained(
                  metadata_path={"library": "null-text"}, vocab_size=vocab_size)}
    if instruction:
        _, found, _ = build_instruction((0, count, 0), blend=instruction_blend(data_path), **common)
    else:
        _, found, _ = build_pretraining((0, count, 0), blend=blend_of(data_path), reset_position_ids=False,
                                        reset_attention_mask=False, eod_mask_loss=False, **common)
    rows = (found[number] for number in range(len(found) if count is None else count))
    if instruction:
        return chain.from_iterable(map(_of_row, rows))
    return (Passage([*row["tokens"].tolist(), int(row["labels"][-1])], None) for row in rows)


def _of_row(row: dict[str, Any]) -> Iterator[Passage]:
    """The samples of one item of `build_instruction`. Of a last id that is not trained it has no more than a 0."""
    tokens, labels, trained = (row[name].tolist() for name in ("tokens", "labels", "loss_mask"))
    for begin, end in pairwise(row["cu_seqlens"][:int(row["samples"]) + 1].tolist()):
        yield Passage([*tokens[begin:end], labels[end - 1]], None, [False, *map(bool, trained[begin:end])])


def windows(ids: Sequence[int], length: int, stride: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(tokens to read, tokens to score after the last of them): every id but the first is scored once, in windows that
    read at most `length` and begin `stride` apart. So a token has at least `length - stride` before it, but for the
    first ones.
    """
    done = 1
    for begin in range(0, len(ids) - 1, stride):
        end = min(begin + length + 1, len(ids))
        yield ids[begin:end - 1], ids[done:end]
        done = end
        if end == len(ids):
            return


def _counted(passage: Passage, length: int, stride: int) -> Iterator[tuple[Sequence[int], Sequence[int], list[bool]]]:
    """`windows`, as far as something in them counts: from the first token that does to the last one, each with whether
    it does.
    """
    done = 1
    for read, scored in windows(passage.ids, length, stride):
        counts = [True] * len(scored) if passage.trained is None else [*passage.trained[done:done + len(scored)]]
        done += len(scored)
        if True in counts:
            first, behind = counts.index(True), counts[::-1].index(True)
            yield read[:len(read) - behind], scored[first:len(scored) - behind], counts[first:len(counts) - behind]


def measure(generator: Generator, passages: Iterable[Passage], stride: int) -> Figures:
    """Score passages, on rank 0 while the others follow. `DataError` where the model's logits are no numbers."""
    figures, length, begin = Figures(), generator.engine.max_length, time.monotonic()

    def asked() -> Iterator[tuple[Sequence[int], Sequence[int], list[bool]]]:
        for passage in passages:
            figures.add(Figures(passages=1, size=passage.size))
            yield from _counted(passage, length, stride)

    said = begin
    for some in batched(asked(), _AT_A_TIME):
        params = [ScoringParams(targets=tuple((one,) for one in scored)) for _, scored, _ in some]
        for place, one in generator.completions([list(read) for read, _, _ in some], params):
            if one.finish_reason == "error":
                raise DataError(one.message)
            counts = some[place][2]
            figures.nats -= math.fsum(found.logprob for found, does in zip(one.logprobs, counts, strict=True) if does)
            figures.tokens += sum(counts)
        now = time.monotonic()
        if now - said > _SAY_EVERY:
            said = now
            logger.info("%d tokens of %d texts, %.0f a second, loss so far %.4f", figures.tokens, figures.passages,
                        figures.tokens / (now - begin), figures.nats / figures.tokens)
    return figures


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line for each of what was measured."""
    lines = ["| data | texts | tokens | bytes | loss | perplexity | bits per byte |",
             "|:---|---:|---:|---:|---:|---:|---:|"]
    for name, one in found.items():
        by_byte = f"{one['bits_per_byte']:.4f}" if "bits_per_byte" in one else ""
        lines.append(f"| {name} | {one['passages']} | {one['tokens']} | {one.get('bytes', '')} | {one['loss']:.6f} | "
                     f"{one['perplexity']:.4f} | {by_byte} |")
    return "\n".join(lines) + "\n"


def _after_bos(ids: list[int], tokenizer: Tokenizer | None) -> list[int]:
    bos = None if tokenizer is None else tokenizer.bos_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def _bytes(ids: Sequence[int], tokenizer: Tokenizer) -> int:
    return len(tokenizer.decode(list(ids)).encode())
