"""Best fit: every sample once, no row too full, rows well filled, and a known case by hand."""

import numpy as np
import pytest

from megatron_mixtral.data.instruction.packing import best_fit


def test_by_hand():
    # 9 opens a row (1 left), 6 a second (4 left), 4 fits the second exactly, 3 opens a third, 1 fills the first.
    assert best_fit(np.array([3, 9, 1, 6, 4]), 10) == [[0], [1, 2], [3, 4]]
    assert best_fit(np.array([], dtype=np.int64), 10) == []


@pytest.mark.parametrize("seed", range(5))
def test_every_sample_once_in_rows_that_hold_them(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(50, 500))
    lengths = rng.integers(1, capacity + 1, 2000)
    rows = best_fit(lengths, capacity)
    assert sorted(sample for row in rows for sample in row) == list(range(2000))
    assert all(lengths[row].sum() <= capacity for row in rows)
    assert rows == sorted(rows) and all(row == sorted(row) for row in rows)
    room = capacity - np.array([lengths[row].sum() for row in rows])
    assert np.count_nonzero(room >= capacity / 2) <= 1, "two rows that are half empty would be one"


def test_short_samples_fill_their_rows():
    lengths = np.random.default_rng(0).integers(1, 100, 5000)
    assert len(best_fit(lengths, 400)) == np.ceil(lengths.sum() / 400)


def test_a_sample_that_fits_no_row_is_ours_to_prevent():
    with pytest.raises(AssertionError, match="must fit a row"):
        best_fit(np.array([11]), 10)
