"""Instruction sets as a run reads them: every row once an epoch, each epoch anew, splits apart, rows that fit."""

from collections import Counter
from typing import Any

import pytest
import torch
from helpers.datasets import numbered_rows, write_rows

from megatron_mixtral.data.datasets import build_instruction, check_instruction, instruction_blend, row_tensors
from megatron_mixtral.data.datasets.instruction_files import InstructionFiles
from megatron_mixtral.errors import DataError

SEQUENCE = 8


def build(words: list[str], samples: tuple[int, int, int], seed: int = 5, split: str = "1,0,0") -> Any:
    return build_instruction(samples, tokenizer=None, seq_length=SEQUENCE, seed=seed, blend=instruction_blend(words),
                             blend_per_split=None, split=split, cache=None, is_built_on_rank=lambda: True)


def numbers(data: Any, first: int, last: int) -> list[int]:
    return [int(data[index]["tokens"][1]) for index in range(first, last)]


def test_sets_without_weights_are_read_row_by_row(tmp_path):
    """A set of 10 rows and one of 30: an epoch of both is 40 rows, each once, and not as many of the one as of the
    other.
    """
    sets = [numbered_rows(tmp_path / "few", 100, 10), numbered_rows(tmp_path / "many", 200, 30)]
    train, _, _ = build(sets, (40, 0, 0))
    assert sorted(numbers(train, 0, 40)) == [*range(100, 110), *range(200, 230)]
    few = sum(number < 200 for number in numbers(train, 0, 20))
    assert 4 <= few <= 6, "a quarter of each half"


def test_weights_that_are_given_count(tmp_path):
    blend = ["0.5", numbered_rows(tmp_path / "few", 100, 10), "0.5", numbered_rows(tmp_path / "many", 200, 30)]
    train, _, _ = build(blend, (40, 0, 0))
    assert sum(number < 200 for number in numbers(train, 0, 40)) == 20


def test_each_epoch_has_an_order_of_its_own(tmp_path):
    prefix = numbered_rows(tmp_path / "set", 100, 20)
    train, _, _ = build([prefix], (60, 0, 0))
    epochs = [numbers(train, start, start + 20) for start in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(100, 120)) for epoch in epochs)
    assert len({*map(tuple, epochs), tuple(range(100, 120))}) == 4
    again, _, _ = build([prefix], (60, 0, 0))
    assert numbers(again, 25, 35) == epochs[1][5:15], "a run that goes on reads what it would have read"
    other, _, _ = build([prefix], (60, 0, 0), seed=6)
    assert numbers(other, 0, 20) != epochs[0]


def test_splits_share_no_row(tmp_path):
    sets = build([numbered_rows(tmp_path / "set", 100, 20)], (40, 20, 20), split="10,6,4")
    read = [Counter(numbers(one, 0, size)) for one, size in zip(sets, (40, 20, 20), strict=True)]
    assert [len(one) for one in read] == [10, 6, 4]
    assert sorted(number for one in read for number in one) == list(range(100, 120))


@pytest.mark.parametrize("row", [[9], [4, 5], [3, 3, 3]], ids=str)
def test_a_row_fits_to_the_position(tmp_path, row):
    """A sample of n ids has n - 1 positions, since its last id predicts nothing."""
    rows = [[([1] * size, [1] * size) for size in one] for one in ([3], row)]
    positions = sum(size - 1 for size in row)
    prefix = write_rows(tmp_path / "set", rows)
    assert InstructionFiles(prefix).longest() == positions
    check_instruction([instruction_blend([prefix])], 10, positions, 1)
    with pytest.raises(DataError, match=f"a row has {positions} positions, --seq-length has {positions - 1}"):
        check_instruction([instruction_blend([prefix])], 10, positions - 1, 1)


def test_a_row_of_two_samples_by_hand():
    samples = [([1, 11, 12, 13], [-100, -100, 12, 13]), ([1, 21, 22], [-100, 21, -100])]
    row = row_tensors([tuple(map(torch.tensor, sample)) for sample in samples], SEQUENCE)
    found = {name: tensor.tolist() for name, tensor in row.items()}
    assert found == {
        "tokens": [1, 11, 12, 1, 21, 0, 0, 0], "labels": [0, 12, 13, 21, 0, 0, 0, 0],
        "loss_mask": [0, 1, 1, 1, 0, 0, 0, 0], "position_ids": [0, 1, 2, 0, 1, 0, 0, 0],
        "padding_mask": [False] * 5 + [True] * 3, "cu_seqlens": [0, 3, 5, 8, 8, 8, 8, 8, 8], "samples": 2}
