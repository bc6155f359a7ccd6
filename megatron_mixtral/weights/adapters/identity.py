"""Which base adapters belong to, and adapters that are new."""

import hashlib
import math
import zlib
from pathlib import Path

import numpy

from megatron_mixtral.config import AdapterConfig
from megatron_mixtral.weights.files import MappedFiles
from megatron_mixtral.weights.protocols import Fragment, TensorSource
from megatron_mixtral.weights.rules import HFTensor, hf_tensors

SAMPLE = 16  # numbers at either end of a tensor


def fingerprint(source: TensorSource) -> str:
    """A hash that identifies a model's weights: names, types, shapes, and the first and last numbers of every tensor.

    The same for every format and layout of the same weights. It reads a few bytes of each tensor, so that 93 GB cost
    no more than a hundred megabytes; training changes every matrix everywhere. One changed number it may not see.
    """
    digest = hashlib.sha256()
    for name, tensor in hf_tensors(source.config).items():
        found = source.fragments(tensor)
        first, last = found[0].data, found[-1].data
        digest.update(f"{name} {found[0].dtype} {tensor.shape}\n".encode())
        digest.update(numpy.ascontiguousarray(first[(0,) * (first.ndim - 1)][:SAMPLE]).tobytes())
        digest.update(numpy.ascontiguousarray(last[(-1,) * (last.ndim - 1)][-SAMPLE:]).tobytes())
    return digest.hexdigest()[:32]


class FreshAdapters(TensorSource):
    """Adapters before training: A uniform within 1 / sqrt(in), as PEFT draws it, and B zero, so they change nothing.

    What is drawn depends on `seed` and the tensor's name only, and so not on the layout.
    """

    signs = ()

    def __init__(self, config: AdapterConfig, seed: int) -> None:
        self.config, self.where, self._seed = config, Path("new adapters"), seed
        self.left_behind, self.companions, self.mapped = [], [], MappedFiles()

    def check(self) -> None:
        """Nothing can be missing."""

    def dtype(self, tensor: HFTensor) -> str:
        return "float32"

    def fragments(self, tensor: HFTensor) -> list[Fragment]:
        """The whole tensor, drawn."""
        if tensor.rule.name.endswith("_A"):
            draw = numpy.random.default_rng([self._seed, zlib.crc32(tensor.name.encode())])
            values = (2 * draw.random(tensor.view, numpy.float32) - 1) / numpy.float32(math.sqrt(tensor.shape[1]))
        else:
            values = numpy.zeros(tensor.view, numpy.float32)
        return [Fragment(0, tensor.view[tensor.rule.shard_dim], values.view("<u4"), "float32", str(self.where))]
