"""Data sets that a run cannot use are refused with their name, before the engine looks at them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.datasets import numbered_dataset, write_dataset

from megatron_mixtral.data.datasets import blend_of, build_pretraining, check_pretraining, identities
from megatron_mixtral.data.indexed import IndexFile
from megatron_mixtral.errors import DataError


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_dataset(tmp_path / "corpus_text_document", vocab_size=96)


def test_blend_with_and_without_weights(prefix: str) -> None:
    assert blend_of(None) is None
    assert blend_of([prefix]) == ([prefix], None)
    assert blend_of(["0.6", prefix, "0.4", prefix]) == ([prefix, prefix], [0.6, 0.4])


def test_missing_file_is_named_with_a_hint(prefix: str) -> None:
    with pytest.raises(DataError, match=r"corpus\.bin does not exist .*did you mean .*corpus_text_document\?"):
        blend_of([prefix.removesuffix("_text_document")])
    Path(prefix + ".idx").unlink()
    with pytest.raises(DataError, match=r"corpus_text_document\.idx does not exist"):
        blend_of([prefix])


def test_negative_weight_is_refused(prefix: str) -> None:
    with pytest.raises(DataError, match="negative weight"):
        blend_of(["-1", prefix, "2", prefix])


def test_tokens_beyond_the_vocabulary_are_refused(prefix: str) -> None:
    check_pretraining([blend_of([prefix])], 96, 32)
    with pytest.raises(DataError, match=r"holds token \d+, the model's vocabulary has 50"):
        check_pretraining([blend_of([prefix])], 50, 32)


@pytest.mark.parametrize("words", [["A"], ["A", "B"], ["A", "B", "C"], ["0.6", "A", "0.4", "B"], ["1", "2", "3"]])
def test_blends_are_read_as_the_engine_reads_them(words: list[str], tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.datasets.utils import get_blend_from_list

    monkeypatch.chdir(tmp_path)
    for name in ("A", "B", "C", "1", "2", "3"):
        write_dataset(Path(name), vocab_size=96)
    prefixes, weights = get_blend_from_list(words)
    assert blend_of(words) == (list(prefixes), weights)


def test_a_weight_that_is_missing_is_named(prefix: str) -> None:
    with pytest.raises(DataError, match=r"weight before every prefix, or before none; .*_document stands where"):
        blend_of(["0.6", prefix, prefix, prefix])


def test_index_file_reads_what_the_engine_reads(prefix: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    ours, theirs = IndexFile(prefix), IndexedDataset(prefix)
    assert ours.lengths.tolist() == theirs.sequence_lengths.tolist() and len(ours) == len(theirs)
    assert ours.documents.tolist() == theirs.document_indices.tolist()
    assert all((ours.sequence(number) == theirs[number]).all() for number in range(len(ours)))


@pytest.mark.parametrize(("suffix", "size", "sentence"), [
    (".idx", 20, "does not begin with"), (".idx", 200, "was cut off"), (".bin", 100, "not of one data set")])
def test_damaged_pairs_are_refused(prefix: str, suffix: str, size: int, sentence: str) -> None:
    path = Path(prefix + suffix)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=sentence):
        check_pretraining([blend_of([prefix])], 96, 32)


def test_a_data_set_shorter_than_a_sample_is_refused(prefix: str) -> None:
    tokens = IndexFile(prefix).tokens
    with pytest.raises(DataError, match=rf"{tokens} tokens in 200 documents; one sample needs 1000001"):
        check_pretraining([blend_of([prefix])], 96, 1_000_000)


def build(prefix: str, samples: tuple[int, int, int], split: str, seq_length: int = 32, seed: int = 1) -> Any:
    tokenizer = SimpleNamespace(vocab_size=96, eod=2, unique_identifiers={})
    return build_pretraining(samples, tokenizer=tokenizer, seq_length=seq_length, seed=seed,
                          blend=([prefix], None), blend_per_split=None, split=split, cache=None,
                          is_built_on_rank=lambda: True,
                          reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False)


def test_empty_and_short_splits_are_refused(prefix: str) -> None:
    with pytest.raises(DataError, match=r"its test split of --split 999,0.5,0.5 holds 0 of 200 documents, 0 tokens"):
        build(prefix, (8, 0, 8), "999,0.5,0.5")
    with pytest.raises(DataError, match=r"its training split .* one sample needs 1000001 \(--seq-length \+ 1\)"):
        build(prefix, (8, 0, 0), "1,0,0", seq_length=1_000_000)


def test_a_data_set_and_a_split_suffice_to_the_token(prefix: str) -> None:
    """A sample has one token more than the sequence: the last one is only predicted."""
    lengths = IndexFile(prefix).lengths
    check_pretraining([blend_of([prefix])], 96, int(lengths.sum()) - 1)
    with pytest.raises(DataError, match="one sample needs"):
        check_pretraining([blend_of([prefix])], 96, int(lengths.sum()))
    half = int(lengths[:100].sum())
    build(prefix, (1, 0, 0), "1,1,0", seq_length=half - 1)
    with pytest.raises(DataError, match="its training split"):
        build(prefix, (1, 0, 0), "1,1,0", seq_length=half)


def test_splits_share_no_document_and_have_all(tmp_path: Path) -> None:
    read = []
    for data in build(numbered_dataset(tmp_path / "set", 0, 50), (60, 30, 10), "60,30,10", seq_length=16):
        read.append({int(token) for index in range(len(data)) for token in data[index]["tokens"]})
    assert [len(tokens) for tokens in read] == [30, 15, 5]
    assert set.union(*read) == set(range(50))


def test_the_seed_decides_the_order(prefix: str) -> None:
    first, again, other = (build(prefix, (40, 0, 0), "1,0,0", seed=seed)[0] for seed in (1, 1, 2))
    rows = [[tuple(data[index]["tokens"].tolist()) for index in range(40)] for data in (first, again, other)]
    assert rows[0] == rows[1] != rows[2]


def test_validation_without_a_part_to_validate_on_is_refused(prefix: str) -> None:
    """The engine notices at the first validation, hours into a run."""
    with pytest.raises(DataError, match=r"the run validates, and --split 100,0,0 gives nothing to validate on"):
        build(prefix, (8, 8, 8), "100,0,0")


def test_a_data_set_is_known_by_what_is_in_it(prefix: str, tmp_path: Path) -> None:
    """A copy is the same whenever it was made; another order of the same documents, or other ids, is not."""
    before = identities([([prefix], None), None])
    assert list(before) == [prefix] and before[prefix].startswith(f"{IndexFile(prefix).tokens} tokens, ")
    ids = Path(prefix + ".bin")
    contents = ids.read_bytes()
    ids.write_bytes(contents)
    assert identities([([prefix], None)]) == before
    ids.write_bytes(contents[::-1])
    assert identities([([prefix], None)]) != before
    other = write_dataset(tmp_path / "other", vocab_size=96, documents=199)
    assert identities([([other], None)])[other] not in before.values()
