"""Reading pickles without running what is in them.

Every global that a pickle names is looked up in an explicit list and answered by an inert record; anything else is
refused by name. So nothing of torch, numpy or megatron is imported, and nothing in a file runs. This is stricter than
`torch.load(weights_only=True)`, and the same for rank files, for the archives inside distributed checkpoints, and for
their metadata.

Python's pickle machine trusts what it is given: ten bytes can ask for gigabytes (a place far out in its memo), and the
hash of a tuple of tuples, deep enough, ends the process. So `scan` goes through the instructions first.
"""

import argparse
import collections
import io
import pickle
import pickletools
import types
from collections.abc import Buffer, Callable, Mapping
from typing import Any

from megatron_mixtral.errors import CheckpointError

# What unpickling raises for damaged bytes, which can come out as any instruction of the pickle machine.
UNPICKLING_ERRORS = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError,
                     AttributeError, ArithmeticError, MemoryError, ImportError)
TYPES = ("bfloat16", "float16", "float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")


MOST_DEPTH = 100  # of containers in containers; a checkpoint has about ten
MOST_STEPS = 20_000_000  # instructions, each of which may make an object; the metadata of a large run has a million


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


_FOREIGN = ("DUP", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER")  # no checkpoint has a use for them
# Of each instruction, by its code: how its argument is stored (`pickletools.ArgumentDescriptor.n`; -6: two lines), how
# many values it takes from the stack, above (None) the last mark or not, and whether it gives one back.
_STEPS = {ord(op.code): (
    0 if op.arg is None else -6 if op.arg.name.endswith("pair") else op.arg.n,
    None if pickletools.markobject in op.stack_before else len(op.stack_before),
    op.stack_before.index(pickletools.markobject) if pickletools.markobject in op.stack_before else 0,
    bool(op.stack_after)) for op in pickletools.opcodes if op.name not in _FOREIGN}
_LENGTHS = {-2: 1, -3: 4, -4: 4, -5: 8}  # bytes of the length in front of an argument
_CHANGING = set(b"aesub\x90")  # what puts values into the one below them
_PUTS, _GETS, _MEMOIZE, _MARK, _STOP = set(b"pqr"), set(b"ghj"), 0x94, ord("("), ord(".")
_LEAF = [0]


def scan(data: Buffer, start: int = 0) -> int:
    """Where the pickle that begins at byte `start` ends.

    Raises `EOFError` where it goes beyond the data, and `ValueError` for one that is deeper than `MOST_DEPTH`, longer
    than `MOST_STEPS`, or has a place in its memo that no pickler would take.
    """
    view, at = bytes(data), start
    # Of every value how deep it is, in a list that all references to it share; None: a mark.
    stack: list[list[int] | None] = []
    memo = dict[int, list[int]]()
    for count in range(MOST_STEPS):
        if at >= len(view):
            raise EOFError("it ends in the middle")
        code, begin = view[at], at + 1
        if code not in _STEPS:
            raise ValueError(f"it has an unknown instruction {code:#x}")
        stored, takes, below, gives = _STEPS[code]
        at = _argument_end(view, begin, stored)
        if code == _STOP:
            return at
        if code == _MARK:
            stack.append(None)
        elif code in _PUTS or code == _MEMOIZE:
            place = len(memo) if code == _MEMOIZE else _place(view[begin:at], stored)
            if not 0 <= place <= count:
                raise ValueError(f"it wants place {place} of a memo after {count} instructions")
            memo[place] = _top(stack)
        elif code in _GETS:
            stack.append(memo[_place(view[begin:at], stored)])
        else:
            _step(stack, code, takes, below, gives)
    raise ValueError(f"it has more than {MOST_STEPS} instructions")


def _step(stack: list[list[int] | None], code: int, takes: int | None, below: int, gives: bool) -> None:
    """What an instruction does to the depths on the stack."""
    taken: list[list[int]] = []
    if takes is None:
        while (one := stack.pop()) is not None:
            taken.append(one)
        takes = below
    for _ in range(takes):
        taken.append(_top(stack))
        stack.pop()
    if not gives:
        return
    if not taken:
        stack.append([0] if code in b"]}\x8f" else _LEAF)
        return
    if code in _CHANGING:
        target = taken.pop()
        target = [0] if target is _LEAF else target
        target[0] = max([target[0], *(one[0] + 1 for one in taken)])
    else:
        target = [1 + max(one[0] for one in taken)]
    if target[0] > MOST_DEPTH:
        raise ValueError(f"it nests values more than {MOST_DEPTH} deep")
    stack.append(target)


def _top(stack: list[list[int] | None]) -> list[int]:
    if not stack or stack[-1] is None:
        raise ValueError("it takes more from its stack than is there")
    return stack[-1]


def _argument_end(view: bytes, at: int, stored: int) -> int:
    """Where the argument that begins at byte `at` ends."""
    if stored >= 0:
        end = at + stored
    elif stored in _LENGTHS:
        end = at + _LENGTHS[stored]
        end += int.from_bytes(view[at:end], "little", signed=stored == -3)
    else:
        end = view.find(b"\n", at) + 1
        if stored == -6 and end:
            end = view.find(b"\n", end) + 1
    if not at <= end <= len(view) or (stored < 0 and end == at):
        raise EOFError("it ends in the middle")
    return end


def _place(argument: bytes, stored: int) -> int:
    return int(argument) if stored < 0 else int.from_bytes(argument, "little")


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
    scan(data)
    return _Unpickler(data, where, known or {}, persistent).load()
