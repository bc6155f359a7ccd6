"""Adapters merged into their base: W + alpha / rank * B A for every linear that has some, read as any source is.

Merged by rows, a block at a time, in float32, and rounded once to the base's type, as PEFT merges.
"""

from functools import lru_cache
from typing import Any

import numpy

from megatron_mixtral.config import AdapterConfig
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.weights.adapters import fingerprint, nf4
from megatron_mixtral.weights.dtypes import FLOATS, cast, type_name
from megatron_mixtral.weights.files import MappedFiles
from megatron_mixtral.weights.plan import whole
from megatron_mixtral.weights.protocols import Fragment, TensorSource
from megatron_mixtral.weights.rules import PEFT_PREFIX, HFTensor, hf_tensors
from megatron_mixtral.weights.streaming import blocks

BLOCK = 1 << 20  # numbers that are merged at a time
KEPT = 1  # merged tensors that are kept: the shards of one that tensor parallelism cuts are asked for in turn


class MergedSource(TensorSource):
    """The model `base` with the adapters of `adapter` merged into it.

    `rounded` merges into the base as it was in a run with 4 bits: every linear that was packed then is rounded to NF4.
    What is merged has the type `dtype` (None: the base's), to which it is rounded once.
    Raises `ConfigError` for adapters of another architecture, `CheckpointError` for those of another base.
    """

    signs = ()

    def __init__(self, base: TensorSource, adapter: TensorSource, *, rounded: bool = False,
                 dtype: Any = None) -> None:
        config = adapter.config
        if not isinstance(config, AdapterConfig) or isinstance(base.config, AdapterConfig):
            raise ConfigError(f"{adapter.where} must hold adapters and {base.where} a whole model, to be merged")
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "head_dim", "num_local_experts")
        for name in names:
            ours, theirs = getattr(base.config, name), getattr(config, name)
            if ours != theirs:
                raise ConfigError(f"{adapter.where} is of a model with {name} {theirs}, {base.where} has {ours}")
        self.config, self.where, self.companions = base.config, base.where, base.companions
        self._base, self._adapter, self._rounded, self._kind = base, adapter, rounded, type_name(dtype)
        self.left_behind, self.mapped = base.left_behind, _Both(base.mapped, adapter.mapped)
        self._matrices = hf_tensors(config)
        self._merge = lru_cache(maxsize=KEPT)(self._merged)

    def check(self) -> None:
        """Both must be whole, and belong together."""
        self._base.check()
        self._adapter.check()
        expected = self._adapter.config.base
        if expected is not None and (found := fingerprint(self._base)) != expected:
            raise CheckpointError(f"{self._adapter.where} holds adapters of the base {expected} "
                                  f"({self._adapter.config.base_name}), and {self._base.where} is {found}: on another "
                                  "base they mean nothing; give the base that they were trained on")

    def dtype(self, tensor: HFTensor) -> str:
        stored = self._base.dtype(tensor)
        return self._kind or stored if self._changes(tensor) else stored

    def fragments(self, tensor: HFTensor) -> list[Fragment]:
        """The base's, or the whole tensor merged where there is something to merge."""
        if not self._changes(tensor):
            return self._base.fragments(tensor)
        return [Fragment(0, tensor.view[tensor.rule.shard_dim], self._merge(tensor), self.dtype(tensor),
                         f"{self._base.where} ({tensor.name}, merged)")]

    def _changes(self, tensor: HFTensor) -> bool:
        return self._name(tensor, "A") in self._matrices or self._packs(tensor)

    def _packs(self, tensor: HFTensor) -> bool:
        return self._rounded and AdapterConfig.packs(tensor.name)

    def _name(self, tensor: HFTensor, letter: str) -> str:
        return PEFT_PREFIX + tensor.name.replace(".weight", f".lora_{letter}.weight")

    def _merged(self, tensor: HFTensor) -> numpy.ndarray:
        """The bit patterns of a merged tensor, in its view."""
        stored, kind, (rows, columns) = self._base.dtype(tensor), self.dtype(tensor), tensor.shape
        wide = FLOATS["float64" if "float64" in (stored, kind) else "float32"]
        numbers = numpy.dtype(f"<f{wide.itemsize}")
        a, b = (self._matrix(self._name(tensor, letter), wide.name) for letter in "AB")
        old = _whole(tensor, self._base)
        new = old if stored == kind else numpy.empty((rows, columns), FLOATS[kind].carrier)
        step = max(1, BLOCK // columns)
        for at in range(0, rows, step):
            part = cast(old[at:at + step].reshape(-1), stored, wide.name).view(numbers).reshape(-1, columns)
            if self._packs(tensor):
                part = nf4.rounded(part.astype(numpy.float32)).astype(numbers)
            if a is not None:
                part = part + numbers.type(self._adapter.config.scale) * (b[at:at + step] @ a)
            new[at:at + step] = cast(part.reshape(-1).view(wide.carrier), wide.name, kind).reshape(-1, columns)
        return new.reshape(tensor.view)

    def _matrix(self, name: str, kind: str) -> numpy.ndarray | None:
        """A or B as numbers; None where this linear has none."""
        tensor = self._matrices.get(name)
        if tensor is None:
            return None
        stored = _whole(tensor, self._adapter).reshape(-1)
        return cast(stored, self._adapter.dtype(tensor), kind).view(f"<f{FLOATS[kind].itemsize}").reshape(tensor.shape)


def _whole(tensor: HFTensor, source: TensorSource) -> numpy.ndarray:
    """A tensor's bit patterns, copied once: the largest are a hundred megabytes, and each thread has one."""
    found, at = numpy.empty(tensor.shape, FLOATS[source.dtype(tensor)].carrier), 0
    flat = found.reshape(-1)
    for block in blocks(whole(tensor), source):
        flat[at:at + block.size] = block.reshape(-1)
        at += block.size
    return found


class _Both(MappedFiles):
    """The files of two sources."""

    def __init__(self, *files: MappedFiles) -> None:
        super().__init__()
        self._each = files

    def check_sums(self, *, fill: bool = True) -> None:
        for each in self._each:
            each.check_sums(fill=fill)

    def release(self) -> None:
        for each in self._each:
            each.release()

