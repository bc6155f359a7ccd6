"""A linear of a few rows on a CPU, as each step of generation has them: its time is that of reading the weight.

The float32 kernels read a weight once for every three rows. A weight larger than the caches comes from memory each
time; cut into blocks that a core's cache holds, it comes once, and all rows meet a block while it is there: an output
layer of 32,000 x 512 takes about half the time for 8 rows. `model/plain.py` and the experts use it.

Shape suffixes: t tokens, i input, o output.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

_ONE_READ = 3  # rows
_FEW = 12  # rows: with more of them, arithmetic takes the time, which whole weights suit better
_BLOCK = 2**20  # bytes


def linear_of_few(x_ti: Tensor, weight_oi: Tensor) -> Tensor:
    """[t, o] = x W^T, without a gradient: for float32 weights that are larger than a block, block by block, where that
    is faster. Each number is the product of the same row and column as it is in the whole.
    """
    if not _ONE_READ < len(x_ti) <= _FEW or x_ti.dtype != torch.float32 or weight_oi.nbytes <= _BLOCK:
        return linear(x_ti, weight_oi)
    rows = max(_BLOCK // weight_oi[0].nbytes, 1)
    return torch.cat([linear(x_ti, block) for block in weight_oi.split(rows)], dim=-1)
