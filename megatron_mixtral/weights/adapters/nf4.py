"""NF4, the 4-bit numbers of QLoRA (arXiv:2305.14314, appendix E): the table, and rounding by it, in numpy.

Blocks of 64 numbers along a row are divided by their largest magnitude and rounded to the nearest of 16 values. Two
numbers share a byte, the first in its high half. `lora.nf4` computes the same in torch; both agree with bitsandbytes
to the bit (tests/unit/lora/test_nf4.py).
"""

import numpy

BLOCK = 64  # numbers that share a largest magnitude
VALUES = numpy.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], numpy.float32)
BOUNDS = (VALUES[1:] + VALUES[:-1]) / numpy.float32(2)  # a number on a bound goes to the lower value
TINY = numpy.float32(1e-38)  # divides a block of zeros


def rounded(numbers: numpy.ndarray) -> numpy.ndarray:
    """float32 [..., i], i a multiple of 64 -> what is left of them after packing and unpacking, in float32.

    For merging into the base as a run computed with it.
    """
    blocks = numbers.reshape(-1, BLOCK)
    largest = numpy.abs(blocks).max(axis=1, keepdims=True)
    codes = numpy.searchsorted(BOUNDS, blocks / numpy.maximum(largest, TINY))
    return (VALUES[codes] * largest).reshape(numbers.shape)
