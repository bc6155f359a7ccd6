"""The CPU/gloo machine: stand-ins for what the engine asks of torch.cuda and NCCL where no GPU is visible.

The engine says "cuda" where it means "the device". Here the device is the CPU: streams and events do nothing (work on
a CPU tensor is done when the call returns), the CUDA generator is the CPU generator, and the few collectives that gloo
lacks are made of those that it has. Slow paths are of no concern: this machine is for trying and testing.

Enabled by `runtime.ready()` only; refuses to hide a visible GPU. Remove a stand-in when the engine asks the
accelerator API (torch.accelerator) instead of torch.cuda: `tests/unit/runtime/cpu/test_stand_ins.py` fails for one
that nothing in the engine asks for any more.
"""

import contextlib
import functools
import importlib
import logging
import os
import pickle
import queue
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import torch

from megatron_mixtral.errors import ConfigError
from megatron_mixtral.runtime.cpu import gloo, heap
from megatron_mixtral.runtime.replacements import Replacements

_CPU = torch.device("cpu")
FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "rand", "randn", "empty_like")


def enable(replacements: Replacements) -> None:
    """Install the stand-ins. `ConfigError` where a GPU is visible."""
    if torch.cuda.is_available():
        raise ConfigError("the CPU stand-in would hide a visible GPU; hide it yourself with CUDA_VISIBLE_DEVICES= "
                          "(an empty value) if the run is meant for the CPU")
    heap.keep_memory()
    # torch.compile would look for a C++ compiler and take minutes to gain nothing on a model this small.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    replacements.set(importlib.import_module("torch._dynamo.config"), "disable", True)
    # And of the engine what was decorated before, where a program imported it first.
    dynamo = importlib.import_module("torch._dynamo.eval_frame")
    replacements.set(dynamo, "_stance", dynamo.DynamoStance("force_eager"))
    for name, value in cuda_functions().items():
        replacements.set(torch.cuda, name, value)
    # `with torch.device("meta")` finds the factories in a table that it makes once, at its first use. Made of the
    # replaced ones, it finds none: transformers, which loads its models so, gives wrong logits without a word.
    torch.utils._device._device_constructors()
    for name in FACTORIES:
        replacements.wrap(torch, name, _made_on_cpu)
    replacements.wrap(torch.Tensor, "to", _moved_to_cpu)
    replacements.set(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    replacements.set(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)
    replacements.set(torch.Tensor, "record_stream", lambda self, stream: None)
    replacements.set(torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self)
    replacements.wrap(torch.Tensor, "type", _type_as_on_cuda)
    gloo.enable(replacements)
    _enable_engine(replacements)


def _enable_engine(replacements: Replacements) -> None:
    """The engine's own places that go around the public torch.cuda functions."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random

    gloo.enable_buffers(replacements)
    replacements.set(random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    replacements.set(random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))
    # The engine's is a process of its own: seconds a rank before the first save, and an orphan when a rank is killed.
    replacements.set(filesystem_async, "get_write_results_queue", lambda mp_mode="fork": _result_queue(os.getpid()))
    # It warns at every initialised weight that the CPU generator moved under the CUDA one; here they are one.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def enable_training(replacements: Replacements) -> None:
    """What `megatron.training` needs besides; apart, because importing it takes seconds that generation can save."""
    from megatron.training import initialize, training

    # `allow_no_cuda` exists, but `pretrain` does not pass it on.
    replacements.set(training, "initialize_megatron",
                     functools.partial(initialize.initialize_megatron, allow_no_cuda=True))
    # Warms up torch.compile on CUDA tensors of the model's size; there is nothing to warm up here.
    replacements.set(training, "set_jit_fusion_options", lambda *args, **kwargs: None)


class ResultQueue:
    """What a forked process of an asynchronous save hands back, by way of an unnamed file that both have open."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile("a+b", buffering=0)
        self._read = 0

    def put(self, results: Any) -> None:
        """Append; the caller's process, or one forked from it."""
        contents = pickle.dumps(results)
        self._file.write(len(contents).to_bytes(8, "little") + contents)

    def get_nowait(self) -> Any:
        """The oldest that was not read yet. Raises `queue.Empty`."""
        head = os.pread(self._file.fileno(), 8, self._read)
        length = int.from_bytes(head, "little")
        contents = os.pread(self._file.fileno(), length, self._read + 8)
        if len(head) < 8 or len(contents) < length:  # nothing, or cut short by the end of its writer
            self._read = os.fstat(self._file.fileno()).st_size
            raise queue.Empty
        self._read += 8 + length
        return pickle.loads(contents)


@functools.cache
def _result_queue(process: int) -> ResultQueue:
    """The one queue of a process that saves."""
    return ResultQueue()


# -- torch.cuda ------------------------------------------------------------------------------------------


class Stream(torch.cpu.Stream):
    """torch's own stand-in, on which everything is already done, with what it lacks of a CUDA stream."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event


class Event(torch.cpu.Event):
    """torch's own stand-in, which also remembers the wall clock, for `elapsed_time`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds, as torch.cuda.Event gives."""
        return (end._seconds - self._seconds) * 1000.0


def cuda_functions() -> dict[str, Any]:
    """Stand-ins by name in torch.cuda."""
    stream = Stream()
    properties = SimpleNamespace(name="cpu", major=0, minor=0, multi_processor_count=os.cpu_count(),
                                 total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    nothing = lambda *args, **kwargs: None  # noqa: E731
    zero = lambda *args, **kwargs: 0  # noqa: E731
    return {
        # With PYTORCH_NVML_BASED_CUDA_CHECK torch would ask the `device_count` below.
        "is_available": lambda: False,
        # A device, not an index: it goes into `device=` and `.to()` everywhere.
        "current_device": lambda: _CPU,
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        **dict.fromkeys(("set_device", "set_stream", "synchronize", "empty_cache"), nothing),
        "Stream": Stream,
        "Event": Event,
        "stream": lambda _stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "is_current_stream_capturing": lambda: False,
        # Not torch.manual_seed: that one seeds every CUDA generator through these very functions.
        "manual_seed": torch.default_generator.manual_seed,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "get_device_properties": lambda device=None: properties,
        # What the engine asks before it allows grouped experts, which work here.
        "get_device_capability": lambda device=None: (8, 0),
        "get_device_name": lambda device=None: "cpu",
        **dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"), zero),
        "memory_stats": lambda device=None: {},
    }


# -- tensors ---------------------------------------------------------------------------------------------


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda")


def _made_on_cpu(function: Any, *args: Any, **kwargs: Any) -> Any:
    if "device" in kwargs and _is_cuda(kwargs["device"]):
        kwargs["device"] = _CPU
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    return function(*args, **kwargs)


def _moved_to_cpu(to: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args and _is_cuda(args[0]):
        args = (_CPU, *args[1:])
    if "device" in kwargs and _is_cuda(kwargs["device"]):
        kwargs["device"] = _CPU
    return to(tensor, *args, **kwargs)


def _type_as_on_cuda(function: Any, tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    """`tensor.type()` as the engine's optimizers compare it: 'torch.cuda.FloatTensor'."""
    if dtype is None:
        return function(tensor).replace("torch.", "torch.cuda.", 1)
    return function(tensor, dtype, *args, **kwargs)
