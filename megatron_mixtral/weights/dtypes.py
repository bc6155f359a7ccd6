"""The types of stored numbers, by torch's names, without torch.

Moving weights needs no arithmetic, so they travel as numpy arrays of their bit patterns ("carriers": uint16 for
bfloat16). Only a cast computes, and only a cast imports torch, whose start would otherwise take longer than the work.
"""

from dataclasses import dataclass
from typing import Any

import numpy

from megatron_mixtral.errors import ConfigError


@dataclass(frozen=True)
class FloatType:
    """A type that weights may have: its name in torch, in safetensors and as a torch storage class."""

    name: str
    safetensors: str
    storage: str
    itemsize: int
    exponent: int  # the exponent's bits in the pattern: all of them set means infinite or not a number

    @property
    def carrier(self) -> numpy.dtype:
        """The numpy type of its bit patterns, little-endian as on disk."""
        return numpy.dtype(f"<u{self.itemsize}")


FLOATS: dict[str, FloatType] = {kind.name: kind for kind in (
    FloatType("bfloat16", "BF16", "BFloat16Storage", 2, 0x7F80),
    FloatType("float16", "F16", "HalfStorage", 2, 0x7C00),
    FloatType("float32", "F32", "FloatStorage", 4, 0x7F800000),
    FloatType("float64", "F64", "DoubleStorage", 8, 0x7FF0000000000000),
)}
SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Other storages that a checkpoint may hold beside its weights (random states, step counts), and bytes of an item.
OTHER_STORAGES = {"ByteStorage": 1, "CharStorage": 1, "BoolStorage": 1, "ShortStorage": 2, "IntStorage": 4,
                  "LongStorage": 8, "UntypedStorage": 1}


def type_name(dtype: Any) -> str | None:
    """The name of a type given as a torch dtype, a name, or a `--params-dtype` value; None of None.

    Raises `ConfigError` for what weights cannot be stored in.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    name = SHORT.get(name, name)
    if name not in FLOATS:
        raise ConfigError(f"--params-dtype {dtype}: expected one of {', '.join([*SHORT, *SHORT.values()])}")
    return name


def cast(block: numpy.ndarray, old: str, new: str) -> numpy.ndarray:
    """Bit patterns of type `old` as those of type `new`, rounded as torch rounds."""
    import torch

    kind, tensor = FLOATS[new], as_torch(block, old).to(getattr(torch, new))
    return tensor.view(getattr(torch, f"int{8 * kind.itemsize}")).numpy().view(kind.carrier)


def as_torch(block: numpy.ndarray, name: str) -> Any:
    """A torch tensor of type `name` over a carrier array, sharing its memory where that is writable."""
    import torch

    block = block if block.flags.writeable and block.flags.c_contiguous else block.copy()
    return torch.from_numpy(block.view(f"<i{block.itemsize}")).view(getattr(torch, name))


def finite(block: numpy.ndarray, name: str) -> bool:
    """Whether no number of a carrier array is infinite or not a number."""
    mask = block.dtype.type(FLOATS[name].exponent)
    return block.size == 0 or bool((block & mask).max() != mask)
