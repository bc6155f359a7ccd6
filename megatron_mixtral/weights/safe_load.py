"""Loading `torch.save` files without running what is in them.

`torch.load(weights_only=True)` with an explicit list of the globals that checkpoints of the engine contain. Classes
of the engine itself (enums in its arguments, states of its re-run machine) are read as inert stand-ins, so nothing
of megatron is imported and nothing of it runs. A file that wants any other global is refused by name.
"""

import argparse
import contextlib
import functools
import io
import pathlib
import pickle
import re
import signal
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_mixtral.errors import CheckpointError

# The list of `megatron.core.safe_globals`, and the arguments that a run stores.
_ENGINE_CLASSES = (
    "megatron.core.enums.ModelType",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
)
# What unpickling raises for damaged bytes, which can come out as any instruction of the pickle machine.
UNPICKLING_ERRORS = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError,
                     AttributeError, ArithmeticError, MemoryError, ImportError)
_ZIP = b"PK\x03\x04"


class EngineValue:
    """What stands for an object of an engine class: its arguments and state are kept, nothing is executed."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"{type(self).__name__}{getattr(self, 'arguments', ())}"


@functools.cache
def allowed_globals() -> list[Any]:
    """What a checkpoint may contain beside tensors, containers and plain values."""
    import numpy
    import numpy.dtypes

    reconstruct = numpy.empty(0).__reduce__()[0]  # public names of it differ between numpy versions
    known: list[Any] = [
        argparse.Namespace, types.SimpleNamespace, pathlib.PosixPath, pathlib.PurePosixPath, signal.Signals, io.BytesIO,
        torch._C.Generator, numpy.ndarray, numpy.dtype, numpy.dtypes.UInt32DType,
        (reconstruct, "numpy.core.multiarray._reconstruct"), (reconstruct, "numpy._core.multiarray._reconstruct"),
        (pathlib.PosixPath, "pathlib._local.PosixPath"),
    ]
    return known + [(type(name.rpartition(".")[2], (EngineValue,), {}), name) for name in _ENGINE_CLASSES]


@contextlib.contextmanager
def named_errors(where: str) -> Iterator[None]:
    """Turn what `torch.load` raises for a file that is broken or wants too much into one sentence."""
    try:
        yield
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:Unsupported global: GLOBAL|Unsupported class|GLOBAL) ([\w.]+)", str(error))
        if wanted:
            raise CheckpointError(f"{where} wants the global {wanted[1]}, which weights have no use for; it was not "
                                  "loaded and nothing in it was run") from None
        raise CheckpointError(f"{where} is not a whole torch file: its pickle is damaged") from None
    except UNPICKLING_ERRORS as error:
        text = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{where} is not a whole torch file: {text}") from None


def _need_archive(stream: BinaryIO, where: str) -> None:
    """Refuse what is no zip archive: torch would try it as a bare pickle, which nothing has been saved as for years."""
    if stream.read(len(_ZIP)) != _ZIP:
        raise CheckpointError(f"{where} is not a whole torch file: it does not begin as an archive")
    stream.seek(0)


def load(path: Path) -> Any:
    """The contents of a `torch.save` file, tensors memory-mapped. Raises `CheckpointError` naming the file."""
    with named_errors(str(path)), open(path, "rb") as stream:
        _need_archive(stream, str(path))
    with named_errors(str(path)), torch.serialization.safe_globals(allowed_globals()):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def load_shape(stream: BinaryIO, where: str) -> Any:
    """The contents of a `torch.save` stream with tensors of the meta device: no tensor data is read."""
    with named_errors(where), torch.serialization.safe_globals(allowed_globals()):
        _need_archive(stream, where)
        return torch.load(stream, map_location="meta", weights_only=True)
