"""Reading pickles without running what is in them.

Every global that a pickle names is looked up in an explicit list and answered by an inert record; anything else is
refused by name. So nothing of torch, numpy or megatron is imported, and nothing in a file runs. This is stricter than
`torch.load(weights_only=True)`, and the same for rank files, for the archives inside distributed checkpoints, and for
their metadata.
"""

import argparse
import collections
import io
import pickle
import types
from collections.abc import Callable, Mapping
from typing import Any

from megatron_mixtral.errors import CheckpointError

# What unpickling raises for damaged bytes, which can come out as any instruction of the pickle machine.
UNPICKLING_ERRORS = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError,
                     AttributeError, ArithmeticError, MemoryError, ImportError)
TYPES = ("bfloat16", "float16", "float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")


class Record:
    """An object of a pickle: its arguments and its state, and nothing else."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class TypeRecord(str):
    """A torch dtype, by its name. One object serves all files, so none may change it."""

    __slots__ = ()


class Arguments(argparse.Namespace):
    """Saved arguments. With a `__setstate__` a pickle changes objects of the class only, not the class itself."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


# Real classes of the standard library that hold data only.
PLAIN = {
    ("collections", "OrderedDict"): collections.OrderedDict, ("argparse", "Namespace"): Arguments,
    ("types", "SimpleNamespace"): types.SimpleNamespace, ("torch", "Size"): tuple,
    ("__builtin__", "set"): set, ("builtins", "set"): set, ("collections", "defaultdict"): Record,
} | {("torch", name): TypeRecord(name) for name in TYPES}


# What the engine's checkpoints contain beside tensors, containers and plain values, by module: `Metadata` and what it
# is made of, the list of `megatron.core.safe_globals`, the arguments that a run stores, and random states.
RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.planner": (
        "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    "torch.distributed._shard.sharded_tensor.metadata": ("TensorProperties", "MEM_FORMAT_ENCODING"),
    "torch.serialization": ("_get_layout",),
    "signal": ("Signals",), "_io": ("BytesIO",), "_codecs": ("encode",), "torch": ("Generator",),
    "pathlib": ("PosixPath", "PurePosixPath"), "pathlib._local": ("PosixPath", "PurePosixPath"),
    "numpy": ("ndarray", "dtype"), "numpy.dtypes": ("UInt32DType",),
    "numpy.core.multiarray": ("_reconstruct",), "numpy._core.multiarray": ("_reconstruct",),
    "megatron.core.enums": ("ModelType",),
    "megatron.core.optimizer.optimizer_config": ("OptimizerConfig",),
    "megatron.core.rerun_state_machine": ("RerunDiagnostic", "RerunMode", "RerunState"),
    "megatron.core.transformer.enums": ("AttnBackend", "CudaGraphModule", "CudaGraphScope", "InferenceCudaGraphScope"),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, where: str, known: Mapping[tuple[str, str], Any],
                 persistent: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(data))
        self.where, self.known, self.persistent = where, {**PLAIN, **known}, persistent

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.known:
            return self.known[module, name]
        if name in RECORDS.get(module, ()):
            return Record
        raise CheckpointError(f"{self.where} wants the global {module}.{name}, which no checkpoint has a use for; it "
                              "was not loaded and nothing in it was run")

    def persistent_load(self, pid: Any) -> Any:
        if self.persistent is None:
            raise CheckpointError(f"{self.where} refers to an object outside of itself")
        return self.persistent(pid)


def unpickle(data: bytes, where: str, known: Mapping[tuple[str, str], Any] | None = None,
             persistent: Callable[[Any], Any] | None = None) -> Any:
    """The value of a pickle. What `RECORDS` lists becomes records; `known` are globals with a meaning.

    Raises `CheckpointError` for any other global, and one of `UNPICKLING_ERRORS` for damaged bytes.
    """
    return _Unpickler(data, where, known or {}, persistent).load()
