"""Packing: which samples share a row of training, so that little of it is padding and no sample is cut.

Best fit, the longest samples first: each goes into the fullest row that still has room for it.
`run.py` writes what is decided here.
"""

from bisect import bisect_left, insort

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of sample numbers: every sample in exactly one row, the lengths of a row at most `capacity` together.

    `lengths` are integers from 1 to `capacity`. The samples of a row rise, and so do the first samples of the rows: the
    result depends on nothing but the arguments.
    """
    assert lengths.size == 0 or 1 <= int(lengths.min()) <= int(lengths.max()) <= capacity, "a sample must fit a row"
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}  # rows by the room they have left
    rooms: list[int] = []  # the sizes of room that some row has, sorted
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sample])
        place = bisect_left(rooms, length)
        if place < len(rooms):
            size = rooms[place]
            row = room[size].pop()
            if not room[size]:
                del room[size], rooms[place]
            rows[row].append(sample)
        else:
            row, size = len(rows), capacity
            rows.append([sample])
        left = size - length
        if left:
            if left not in room:
                room[left] = []
                insort(rooms, left)
            room[left].append(row)
    return sorted(sorted(row) for row in rows)
