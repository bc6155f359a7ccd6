"""Data sets that a run cannot use are refused with their name, before the engine looks at them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.datasets import write_dataset

from megatron_mixtral.data import pretrain
from megatron_mixtral.errors import DataError


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_dataset(tmp_path / "corpus_text_document", vocab_size=96)


def test_blend_with_and_without_weights(prefix: str) -> None:
    assert pretrain.blend_of(None) is None
    assert pretrain.blend_of([prefix]) == ([prefix], None)
    assert pretrain.blend_of(["0.6", prefix, "0.4", prefix]) == ([prefix, prefix], [0.6, 0.4])


def test_missing_file_is_named_with_a_hint(prefix: str) -> None:
    with pytest.raises(DataError, match=r"corpus\.bin does not exist .*did you mean .*corpus_text_document\?"):
        pretrain.blend_of([prefix.removesuffix("_text_document")])
    Path(prefix + ".idx").unlink()
    with pytest.raises(DataError, match=r"corpus_text_document\.idx does not exist"):
        pretrain.blend_of([prefix])


def test_negative_weight_is_refused(prefix: str) -> None:
    with pytest.raises(DataError, match="negative weight"):
        pretrain.blend_of(["-1", prefix, "2", prefix])


def test_tokens_beyond_the_vocabulary_are_refused(prefix: str) -> None:
    pretrain.check_vocabulary([prefix], 96)
    with pytest.raises(DataError, match=r"holds token \d+, the model's vocabulary has 50"):
        pretrain.check_vocabulary([prefix], 50)


def build(prefix: str, samples: tuple[int, int, int], split: str, seq_length: int = 32) -> object:
    return pretrain.build(samples, tokenizer=SimpleNamespace(vocab_size=96), seq_length=seq_length, seed=1,
                          blend=([prefix], None), blend_per_split=None, split=split, cache=None,
                          is_built_on_rank=lambda: True,
                          reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False)


def test_empty_and_short_splits_are_refused(prefix: str) -> None:
    with pytest.raises(DataError, match=r"its test split of --split 999,0.5,0.5 holds 0 of 200 documents, 0 tokens"):
        build(prefix, (8, 0, 8), "999,0.5,0.5")
    with pytest.raises(DataError, match=r"its training split .* one sample needs 1000001 \(--seq-length \+ 1\)"):
        build(prefix, (8, 0, 0), "1,0,0", seq_length=1_000_000)
