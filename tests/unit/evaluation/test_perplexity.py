"""What perplexity counts: each token once, the bytes of its text, and what cannot be read with its line."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.datasets import write_dataset
from helpers.models import random_hf_directory
from helpers.vocabularies import write_letters

from megatron_mixtral import __main__ as commands
from megatron_mixtral.config import preset
from megatron_mixtral.data.indexed import IndexedWriter
from megatron_mixtral.errors import DataError
from megatron_mixtral.evaluation import perplexity
from megatron_mixtral.inference import Completion, TokenLogprobs
from megatron_mixtral.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer("HuggingFaceTokenizer", write_letters(tmp_path_factory.mktemp("letters")))


class Recorder:
    """A generator in which the token i has the log-probability -i."""

    def __init__(self, length: int, broken: bool = False) -> None:
        self.engine, self.read, self.broken = SimpleNamespace(max_length=length), 0, broken

    def completions(self, prompts: list[list[int]], params: list[Any]) -> Any:
        for place, (ids, one) in enumerate(zip(prompts, params, strict=True)):
            assert len(one.targets) <= len(ids) <= self.engine.max_length
            self.read += len(ids)
            scores = [TokenLogprobs(token, -float(token), ()) for (token,) in one.targets]
            if self.broken:
                yield place, Completion(tuple(ids), 0, (), "", (), "error", message="no numbers")
            yield place, Completion(tuple(ids), 0, (), "", tuple(scores), "scored")


@pytest.mark.parametrize(("tokens", "length", "stride"), [(2, 8, 8), (9, 8, 8), (10, 8, 8), (40, 8, 8), (41, 8, 3),
                                                          (40, 8, 1), (5, 1, 1), (1, 8, 8), (0, 8, 8)])
def test_windows_are_those_of_the_guide_of_transformers(tokens, length, stride) -> None:
    ids, expected, done = [*range(100, 100 + tokens)], [], 0
    for begin in range(0, tokens, stride):  # as the guide has it: its windows are as long as what is read and scored
        end = min(begin + length + 1, tokens)
        input_ids, count = ids[begin:end], end - done
        scored = input_ids[1:][-count:]  # labels are shifted by one inside of the model
        if scored:
            expected.append((input_ids[:-1], scored))
        done = end
        if end == tokens:
            break
    assert [*perplexity.windows(ids, length, stride)] == expected
    assert [one for _, scored in expected for one in scored] == ids[1:]


def test_loss_and_perplexities_are_of_tokens_and_of_bytes() -> None:
    generator = Recorder(4)
    some = [perplexity.Passage([1, 2, 3, 4, 5, 6, 7], 9), perplexity.Passage([1], 0), perplexity.Passage([1, 3], 2)]
    found = perplexity.measure(generator, some, stride=2)
    assert (found.passages, found.tokens, found.nats, found.size) == (3, 7, 30.0, 11)
    assert found.report("a") == pytest.approx({
        "passages": 3, "tokens": 7, "bytes": 11, "loss": 30 / 7, "perplexity": math.exp(30 / 7),
        "bits_per_byte": 30 / math.log(2) / 11, "byte_perplexity": math.exp(30 / 11)})
    found.add(perplexity.Figures(1, 1, 2.0, None))
    assert found.size is None and "bits_per_byte" not in found.report("a") and found.report("a")["loss"] == 4.0
    with pytest.raises(DataError, match="a.txt holds nothing to score"):
        perplexity.Figures(passages=1).report("a.txt")
    with pytest.raises(DataError, match="no numbers"):
        perplexity.measure(Recorder(4, broken=True), some, stride=4)


def test_of_instruction_data_the_trained_tokens_count() -> None:
    """And what stands behind the last of them is not read."""
    generator = Recorder(4)
    some = [perplexity.Passage([1, 2, 3, 4, 5, 6, 7, 8], None, [True, True, False, True, False, True, False, False]),
            perplexity.Passage([9, 9, 9], None, [True, False, False])]
    found = perplexity.measure(generator, some, stride=4)
    assert (found.passages, found.tokens, found.nats, found.size) == (2, 3, 2.0 + 4.0 + 6.0, None)
    assert generator.read == len([1, 2, 3]) + len([5]), "of the windows of 1 2 3 4 and of 5 6 7"
    with pytest.raises(DataError, match="a holds nothing to score: .* of instruction data one that is trained"):
        perplexity.measure(Recorder(4), some[1:], stride=4).report("a")


def test_texts_are_read_as_preprocessing_reads_them(tmp_path, letters) -> None:
    bos = letters.bos_id
    (tmp_path / "a.txt").write_text("one\ntwo é", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "ab"}\n{"text": ""}\n\n{"text": "c"}\n')
    [whole] = perplexity.texts(str(tmp_path / "a.txt"), "text", letters)
    assert whole.ids == [bos, *letters.encode("one\ntwo é")] and whole.size == 10
    assert [*perplexity.texts(str(tmp_path / "b.jsonl"), "text", letters)] == [
        perplexity.Passage([bos, *letters.encode("ab")], 2), perplexity.Passage([bos, *letters.encode("c")], 1)]
    (tmp_path / "b.jsonl").write_text('{"text": "ab"}\n\n{"title": "c"}\n')
    with pytest.raises(DataError, match=r"b.jsonl, line 3: no key 'text'.*\(choose with --json-key\)"):
        [*perplexity.texts(str(tmp_path / "b.jsonl"), "text", letters)]
    with pytest.raises(DataError, match="c.txt cannot be read"):
        [*perplexity.texts(str(tmp_path / "c.txt"), "text", letters)]


def test_documents_begin_with_one_bos_and_their_bytes_are_those_of_their_text(tmp_path, letters) -> None:
    texts, bos, eos = ["ab\nc", "d e f"], letters.bos_id, letters.eos_id
    rows = [[*letters.encode(texts[0]), eos], [bos, *letters.encode(texts[1]), eos]]
    writer = IndexedWriter(tmp_path / "data", np.dtype(np.uint16), tmp_path)
    writer.add(np.array(sum(rows, []), dtype=np.uint16), np.array([len(row) for row in rows], dtype=np.int32))
    writer.finish()
    writer.publish()
    writer.close()
    prefix = str(tmp_path / "data")
    assert [*perplexity.documents(prefix, letters)] == [
        perplexity.Passage([bos, *letters.encode(text), eos], len(text)) for text in texts]
    assert [*perplexity.documents(prefix, None)] == [perplexity.Passage(row, None) for row in rows]
    without = SimpleNamespace(bos_id=None, decode=letters.decode)
    assert [one.size for one in perplexity.documents(prefix, without)] == [3, 5], "the first token is not scored"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("perplexity")
    random_hf_directory(found / "hf", dataclasses.replace(preset("tiny"), vocab_size=96, num_hidden_layers=1))
    (found / "a.txt").write_text("a")
    (found / "nothing").mkdir()
    (found / "empty.txt").write_text("")
    (found / "bytes.txt").write_bytes(b"a\xff")
    write_dataset(found / "b", vocab_size=96, documents=2)
    for column in ("input_ids", "labels"):
        for suffix in (".bin", ".idx"):
            (found / f"a_packed_{column}_document{suffix}").write_bytes(b"")
    return found


@pytest.mark.parametrize(("flags", "sentence"), [
    ("", "expected data sets (--data-path PREFIX ...) or texts (--input FILE ...), one of the two"),
    ("--input a.txt --data-path b", "one of the two"),
    ("--input a.txt --samples 3", "--samples is of samples as a run reads them: give its --seq-length"),
    ("--input a.txt --seed 3", "--seed is of samples"),
    ("--input a.txt --seq-length 8", "--seq-length cuts data sets into a run's samples (--data-path)"),
    ("--data-path a b --seq-length 8", "an epoch is of one data set: of a blend, say how many --samples"),
    ("--input absent.txt", "--input absent.txt does not exist"),
    ("--data-path absent", "absent.bin does not exist"),
    ("--input a.txt --stride 0", "--stride 0: expected at least 1"),
    ("--input a.txt --stride 9 --max-length 8", "--stride 9 is more than a window reads, 8 tokens (--max-length)"),
    ("--input a.txt --stride 99999", "--stride 99999 is more than a window reads, "),
    ("--input a.txt a.txt", "--input names a.txt twice"),
    ("--input a.txt empty.txt", "empty.txt is empty: there is nothing to score"),
    ("--input bytes.txt", "bytes.txt cannot be read: 'utf-8' codec can't decode byte 0xff"),
    ("--input nothing", "--input nothing: no file of this folder ends in .jsonl"),
    ("--input a.txt --is-instruction-dataset", "--is-instruction-dataset is of data sets (--data-path)"),
    ("--data-path a_packed_labels_document", "give --data-path a --is-instruction-dataset"),
    ("--data-path a", "instruction data is read with --is-instruction-dataset"),
    ("--data-path b --seq-length 8 --data-cache-path a.txt/x", "--data-cache-path: nothing can be written in a.txt/x"),
    ("--data-path a --seq-length 8 --split junk", "--split junk: expected the sizes of three parts, such as 98,1,1"),
    ("--data-path a --seq-length 8 --split 1,1,1,1", "--split 1,1,1,1: expected the sizes of three parts"),
    ("--data-path a --seq-length 8 --split 1.2.3,1", "--split 1.2.3,1: expected the sizes of three parts"),
    ("--data-path a --seq-length 8 --split 100", "--split 100 leaves nothing to validate on"),
    ("--input a.txt --output a.txt/x", "--output: nothing can be written in a.txt (Not a directory)"),
    ("--input a.txt --output .", "--output . is a folder: expected the name of a file"),
])
def test_what_cannot_be_is_refused_before_a_rank_is_started(flags, sentence, folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    assert commands.run("perplexity", ["--load", "hf", "--output", "out.json", *flags.split()]) == 1
    assert sentence in capsys.readouterr().err and not (folder / "out.json").exists()


def test_the_table_has_a_line_for_each() -> None:
    found = {"a": perplexity.Figures(1, 2, 3.0, 4).report("a"), "b": perplexity.Figures(1, 2, 3.0, None).report("b")}
    assert perplexity.table(found).splitlines()[2:] == [
        "| a | 1 | 2 | 4 | 1.500000 | 4.4817 | 1.0820 |", "| b | 1 | 2 |  | 1.500000 | 4.4817 |  |"]
    assert json.loads(json.dumps(found)) == found
