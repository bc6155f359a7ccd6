"""A GPU that computes nothing: tensors without contents that say they are on CUDA, and ranks that are not there.

What runs are the CUDA branches of this library and of the engine. torch checks shapes, types and strides by its meta
kernels, so a branch that cannot work fails here. What no meta tensor has, the host is given: how many tokens go to
which expert (`Routing`). Every place where a GPU would let the host wait is counted (`waits`).

For a process of its own: what is replaced is not put back.
"""

import functools
import importlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional

META = torch.device("meta")
NAME, MEMORY = "NVIDIA H100 80GB HBM3", 80 * 10**9

capability = (9, 0)
waits: Counter[str] = Counter()  # by where the host waits
order: list[str] = []  # F and B: forward and backward passes of a micro-batch through a model chunk, as they came
masked: Counter[str] = Counter()  # attention with a mask, or in fp32: no flash kernel serves it


fused: list[str] = []  # functions for torch.compile that run now; they run as they are written
on_fused: list[Callable[[str, Any, Any], None]] = []  # are told of each that has run: name, arguments, results


def _compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        fused.append(function.__name__)
        try:
            found = function(*args, **kwargs)
        finally:
            fused.pop()
        if not fused:
            for listener in on_fused:
                listener(function.__name__, (args, kwargs), found)
        return found

    return run


def forget() -> None:
    """Count from here."""
    waits.clear()
    masked.clear()
    order.clear()


def _place() -> str:
    """The innermost line of the engine or of this library."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        if "/megatron" in frame.filename:
            return f"megatron{frame.filename.rpartition('/megatron')[2]}:{frame.lineno}"
    return "elsewhere"


def enable() -> None:
    """Before anything of the engine is imported."""
    importlib.import_module("torch._dynamo.config").disable = True
    torch.compile = _compiled
    torch.utils._device._device_constructors()  # see stand_ins.enable
    torch.cuda.device_count = lambda: 8
    _cuda()
    _tensors()
    _kernels()


def _cuda() -> None:
    from megatron_mixtral.runtime.cpu import stand_ins

    stand_ins._CPU = META
    made = stand_ins.cuda_functions()
    state = torch.ByteTensor(16)

    class Event(stand_ins.Event):
        def synchronize(self) -> None:
            waits[_place()] += 1

    class Stream(stand_ins.Stream):
        def synchronize(self) -> None:
            waits[_place()] += 1

        def record_event(self, event: Any = None) -> Any:
            return event or Event()
    made |= {
        "get_device_capability": lambda device=None: capability, "get_device_name": lambda device=None: NAME,
        "get_rng_state": lambda device=None: state, "set_rng_state": lambda state, device=None: None,
        "manual_seed": lambda seed: None, "Event": Event, "Stream": Stream,
        "current_stream": lambda device=None: Stream(), "default_stream": lambda device=None: Stream(),
        "is_available": lambda: True, "device_count": torch.cuda.device_count, "current_device": lambda: META,
        "synchronize": lambda device=None: waits.update([_place()])}
    for name, value in made.items():
        setattr(torch.cuda, name, value)
    made["get_device_properties"]().total_memory = MEMORY
    for name in stand_ins.FACTORIES:
        _wrap(torch, name, stand_ins._made_on_cpu)


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))


# -- tensors --------------------------------------------------------------------------------------------


def _is_fake(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.device.type == "meta"


def _tensors() -> None:
    torch.Tensor.is_cuda = property(_is_fake)
    torch.Tensor.record_stream = lambda self, stream: None
    torch.Tensor.pin_memory = lambda self, *args: setattr(self, "pinned", True) or self
    torch.nn.Module.cuda = lambda self, *args: _moved(self)
    kinds = {torch.float32: "torch.cuda.FloatTensor", torch.bfloat16: "torch.cuda.BFloat16Tensor"}
    _wrap(torch.Tensor, "type", lambda type_, self, *args: type_(self, *args) if args else kinds[self.dtype])
    # Addresses, where the engine and the experts ask whether tensors lie behind one another.
    address = lambda storage: (storage._cdata & 0xffffffff) << 40  # noqa: E731
    _wrap(torch.UntypedStorage, "data_ptr",
          lambda of, self: address(self) if self.device.type == "meta" else of(self))
    _wrap(torch.Tensor, "data_ptr", lambda of, self: of(self) if not _is_fake(self) else
          address(self.untyped_storage()) + self.storage_offset() * self.element_size())
    for name, value in {"item": 1.0, "__float__": 1.0, "__int__": 1, "__bool__": False, "tolist": None}.items():
        _wrap(torch.Tensor, name, _read(value))
    _wrap(torch.Tensor, "to", _to)
    _wrap(torch.Tensor, "cuda", lambda cuda, self, *args, **kwargs: self.to(META, **kwargs))
    _wrap(torch, "tensor", _tensor)


def _read(value: Any) -> Callable[..., Any]:
    def read(original: Callable[..., Any], self: torch.Tensor) -> Any:
        if not _is_fake(self):
            return original(self)
        waits[_place()] += 1
        return Routing.of(self).tolist() if value is None else value

    return read


def _to(to: Callable[..., torch.Tensor], self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    device = kwargs.get("device", args[0] if args else None)
    if isinstance(device, str | torch.device):
        device = torch.device(device)
        kwargs["device"], args = META if device.type == "cuda" else device, args[1:] if "device" not in kwargs else args
        if _is_fake(self) and device.type == "cpu":
            if not kwargs.get("non_blocking"):
                waits[_place()] += 1
            return torch.from_numpy(Routing.of(self).copy())
        pinned = kwargs.get("non_blocking") and hasattr(self, "pinned")
        if not _is_fake(self) and kwargs["device"] == META and not pinned:
            waits[_place()] += 1
    return to(self, *args, **kwargs)


def _tensor(tensor: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """From the host's memory, for which CUDA waits."""
    made = tensor(*args, **kwargs)
    if _is_fake(made):
        waits[_place()] += 1
    return made


def _moved(module: torch.nn.Module) -> torch.nn.Module:
    """The module on the device, with parameters that keep their attributes, as they do on CUDA."""
    for one in module.modules():
        for name, parameter in one._parameters.items():
            if parameter is not None and not parameter.is_cuda:
                new = torch.nn.Parameter(torch.empty_like(parameter, device=META), parameter.requires_grad)
                new.__dict__.update(parameter.__dict__)
                one._parameters[name] = new
        for name, buffer in one._buffers.items():
            if buffer is not None:
                one._buffers[name] = torch.empty_like(buffer, device=META)
        if getattr(one, "inv_freq", None) is not None:
            one.inv_freq = torch.empty_like(one.inv_freq, device=META)
    return module


# -- kernels that a GPU has and a CPU makes of many -----------------------------------------------------


class _Norm(torch.autograd.Function):
    """aten::_fused_rms_norm on CUDA: it keeps its input and a number for each row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _attention(sdpa: Callable[..., torch.Tensor], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, scale: Any = None,
               enable_gqa: bool = False) -> torch.Tensor:
    if attn_mask is None and q.dtype in (torch.bfloat16, torch.float16):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[0]
    masked[_place()] += 1
    return sdpa(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _kernels() -> None:
    from megatron_mixtral.runtime.gpu import products

    products.adds_into_fp32 = lambda: True
    products._milliseconds = lambda way: 0.0  # then the first way is taken
    _wrap(functional, "scaled_dot_product_attention", _attention)
    functional.rms_norm = lambda x, shape, weight, eps: _Norm.apply(x, weight)


# -- what the host is told ------------------------------------------------------------------------------


class Routing:
    """How many of a rank's tokens go to each expert; the same on every rank, and nearly the same for every expert."""

    _known: dict[int, tuple[torch.Tensor, np.ndarray]] = {}

    @classmethod
    def of(cls, tensor: torch.Tensor) -> np.ndarray:
        """The contents of a tensor of counts. KeyError for one of which nothing is known: nobody should read it."""
        return cls._known[id(tensor)][1]

    @classmethod
    def tell(cls, tensor: Any, values: Any) -> None:
        if _is_fake(tensor):
            cls._known[id(tensor)] = (tensor, np.asarray(values).reshape(tuple(tensor.shape)))

    @classmethod
    def install(cls) -> None:
        """Tell what the engine's dispatcher reads, when it reads it."""
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

        random._get_cuda_rng_state = lambda *args, **kwargs: torch.ByteTensor(16)
        random._set_cuda_rng_state = lambda *args, **kwargs: None
        def look(original: Callable[..., Any], self: Any, point: str, tokens_per_expert: Any = None) -> Any:
            if point == self.cuda_dtoh_point:
                cls._tell_dispatcher(self, tokens_per_expert)
            return original(self, point, tokens_per_expert)

        _wrap(MoEAlltoAllTokenDispatcher, "_maybe_dtoh_and_synchronize", look)
        for name in ("forward_step", "backward_step"):
            _wrap(schedules, name, functools.partial(_noted, name[0].upper()))

    @classmethod
    def _tell_dispatcher(cls, one: Any, tokens_per_expert: Any) -> None:
        cls._known.clear()
        sent = one.routing_map.shape[0] * one.config.moe_router_topk
        experts = np.full(one.num_experts, sent // one.num_experts)
        if one.num_local_experts > 1:
            experts[:2] += [5, -5]  # ragged, as routing is
        local = experts.reshape(one.ep_size, one.num_local_experts)[one.ep_group.rank()]
        cls.tell(tokens_per_expert, local * one.ep_size * one.tp_size)
        cls.tell(one.input_splits, experts.reshape(one.ep_size, -1).sum(1))
        cls.tell(one.output_splits, [local.sum()] * one.ep_size)
        cls.tell(one.output_splits_tp, [local.sum() * one.ep_size] * one.tp_size)
        if one.num_local_experts > 1:
            cls.tell(one.num_global_tokens_per_local_expert, np.tile(local, one.tp_size * one.ep_size))


def _noted(letter: str, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    order.append(letter)
    return step(*args, **kwargs)


# -- ranks ----------------------------------------------------------------------------------------------


_coalesced = torch.library.Library("c10d", "IMPL", "Meta")


class _Done:
    def wait(self) -> bool:
        return True

    is_completed = wait


@contextmanager
def ranks(rank: int, world: int) -> Iterator[None]:
    """A process group in which this process is `rank` of `world`, and nobody else exists."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def connect(sent: Callable[[torch.Tensor, Any], None]) -> None:
    """The collectives that the fake group lacks. `sent` is told of each tensor that goes to another stage."""

    def isend(tensor: torch.Tensor, dst: Any = None, group: Any = None, *args: Any, **kwargs: Any) -> _Done:
        sent(tensor, group)
        return _Done()

    def irecv(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> _Done:
        return _Done()

    def exchange(operations: list[Any]) -> list[_Done]:
        return [one.op(one.tensor, group=one.group) for one in operations]

    def gathered(found: list[Any], value: Any, group: Any = None) -> None:
        found[:] = [value] * len(found)

    done = torch._C._distributed_c10d.FakeWork().boxed()
    for name in ("reduce_scatter_tensor_coalesced_", "allgather_into_tensor_coalesced_"):
        _coalesced.impl(name, lambda *args: done)
    for module in (dist, dist.distributed_c10d):
        module.isend, module.irecv = isend, irecv
    dist.batch_isend_irecv = exchange
    dist.all_gather_object = gathered
