"""A linear of a few rows on a CPU, as each step of generation has them: its time is that of reading the weight.

The float32 kernel reads a weight at the speed of memory for up to three rows, at half of it for four, at a third for
eight. A batch of products, each of a block of the weight that the nearest cache holds, stays above two thirds up to
eight rows. `model/plain.py` and the experts use it.

Shape suffixes: t tokens, i input, o output, b blocks, p rows of a block.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

_ONE_READ = 3  # rows
_FEW = 12  # rows: with more of them, arithmetic takes the time, which whole weights suit better
_BLOCK = 32  # rows of a weight
_LEAST = 2**20  # bytes of a weight: smaller ones stay in the caches


def linear_of_few(x_ti: Tensor, weight_oi: Tensor) -> Tensor:
    """[t, o] = x W^T, without a gradient: for large float32 weights block by block, where that is faster. Each number
    is the product of the same row and column as it is in the whole.
    """
    if not _ONE_READ < len(x_ti) <= _FEW or x_ti.dtype != torch.float32 or weight_oi.nbytes <= _LEAST:
        return linear(x_ti, weight_oi)
    whole = len(weight_oi) // _BLOCK * _BLOCK
    blocks_bpi = weight_oi[:whole].unflatten(0, (-1, _BLOCK))
    products_btp = torch.bmm(x_ti.expand(len(blocks_bpi), *x_ti.shape), blocks_bpi.transpose(1, 2))
    products_to = products_btp.transpose(0, 1).flatten(1)
    return products_to if whole == len(weight_oi) else torch.cat((products_to, linear(x_ti, weight_oi[whole:])), dim=1)
