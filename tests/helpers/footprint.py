"""What one optimizer step really holds and sends, counted on a rank: the measure of the planner's arithmetic."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.engine import _forward_loss, _schedule, set_up


class SavedBytes:
    """The most bytes that autograd held at once, parameters excluded. Each storage counts once, with the size that it
    has at the moment: a recomputed output is saved, and then its storage is given back.
    """

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in parameters}
        self._holders: Counter[int] = Counter()
        self._storages: dict[int, torch.UntypedStorage] = {}
        self.peak = 0

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(self, tensor), lambda one: one.tensor)

    def take(self, storage: torch.UntypedStorage) -> None:
        self._holders[storage._cdata] += 1
        if storage.data_ptr() not in self._known:
            self._storages[storage._cdata] = storage
            self.peak = max(self.peak, sum(one.nbytes() for one in self._storages.values()))

    def leave(self, storage: torch.UntypedStorage) -> None:
        self._holders[storage._cdata] -= 1
        if self._holders[storage._cdata] == 0:
            self._storages.pop(storage._cdata, None)


class _Saved:
    """One saved tensor; its end is the end of the graph's need for it."""

    def __init__(self, account: SavedBytes, tensor: torch.Tensor) -> None:
        self.tensor, self._account, self._storage = tensor, account, tensor.untyped_storage()
        account.take(self._storage)

    def __del__(self) -> None:
        self._account.leave(self._storage)


class SentBytes(TorchDispatchMode):
    """Bytes that this rank would send if every collective were a ring, by operation and ranks of its group."""

    def __init__(self) -> None:
        super().__init__()
        self.by_group: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self._count(function._schema.name.removeprefix("c10d::"), args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        share: dict[str, Callable[[int], float]] = {
            "allreduce_": lambda n: 2 * (n - 1) / n, "_allgather_base_": lambda n: (n - 1) / n,
            "allgather_": lambda n: (n - 1) / n, "_reduce_scatter_base_": lambda n: (n - 1) / n,
            "alltoall_base_": lambda n: (n - 1) / n, "send": lambda n: 1.0}
        share["allgather_into_tensor_coalesced_"] = share["reduce_scatter_tensor_coalesced_"] = lambda n: (n - 1) / n
        share["reduce_scatter_"] = lambda n: (n - 1) / n
        if name not in share:
            return
        group = next(torch.distributed.ProcessGroup.unbox(one) for one in args if isinstance(one, torch.ScriptObject))
        whole = args[1] if name in ("_reduce_scatter_base_", "alltoall_base_",
                                    "reduce_scatter_tensor_coalesced_", "reduce_scatter_") else args[0]
        size = sum(tensor.nbytes for tensor in _tensors(whole))
        ranks = tuple(torch.distributed.get_process_group_ranks(group))
        self.by_group[name, ranks] += size * share[name](len(ranks))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for one in value for tensor in _tensors(one)]


def measure(rank: int, config: Any, layout: dict[str, int], dtype: torch.dtype, micro_batches: int,
            sequence: int, engine_fields: dict[str, Any] | None = None, adapter: Any = None,
            ready: Callable[[], None] | None = None, micro_batch: int = 1) -> dict[str, Any]:
    """One training step of a randomly initialised Mixtral, or its adapters; bytes held by kind, and sent by group.
    `ready` is called before the step; `micro_batch` is the sequences of a micro-batch, 1 in a pipeline.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
    from megatron.core.transformer.module import Float16Module
    from megatron.core.utils import get_batch_on_this_cp_rank

    from megatron_mixtral.lora import adapted
    from megatron_mixtral.model import build, transformer_config

    laid = set_up(layout)
    engine = transformer_config(config, laid, dtype, **(engine_fields or {}))
    pp, chunks = mpu.get_pipeline_model_parallel_rank(), []
    for chunk in range(laid.vpp):
        make = build if adapter is None else adapted
        model = make(adapter or config, engine, max_sequence_length=sequence, padded_vocab_size=config.vocab_size,
                     pre_process=laid.is_first(pp, chunk), post_process=laid.is_last(pp, chunk),
                     vp_stage=chunk if laid.vpp > 1 else None)
        for packed in [one for one in model.modules() if hasattr(one, "absmax")]:
            packed.absmax.fill_(0.1)
            packed.nf4.random_()
        for parameter in model.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        model.cuda(torch.cuda.current_device())
        chunks.append(model if dtype == torch.float32 else Float16Module(engine, model))
    half = dtype != torch.float32
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=half)
    chunks = [DistributedDataParallel(engine, ddp, chunk, disable_bucketing=index > 0)
              for index, chunk in enumerate(chunks)]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True, bf16=half,
                        params_dtype=dtype), chunks,
        use_gloo_process_groups=torch.distributed.get_backend() != "fake")
    engine.finalize_model_grads_func = finalize_model_grads
    engine.grad_scale_func = optimizer.scale_loss
    rows = torch.randint(3, config.vocab_size, (micro_batches * micro_batch, sequence + 1),
                         generator=torch.Generator().manual_seed(rank // (laid.tp * laid.pp)))
    rows = rows.to(torch.cuda.current_device())
    micro = [get_batch_on_this_cp_rank({"tokens": part[:, :-1].contiguous(), "labels": part[:, 1:].contiguous()},
                                       is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
             for part in rows.split(micro_batch)]
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    frozen = [one for chunk in chunks for name, one in chunk.named_buffers() if name.endswith(("nf4", "absmax"))]
    saved, sent = SavedBytes([*parameters, *frozen]), SentBytes()
    if ready is not None:
        ready()
    with sent:
        with saved.hooks():
            _schedule(chunks, micro, _forward_loss, forward_only=False)
        optimizer.step()
    buffers = [buffer for chunk in chunks for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    return {
        "weights": sum(one.nbytes for one in (*parameters, *frozen)),
        "dense": sum(one.numel() for one in parameters if getattr(one, "allreduce", True)),
        "expert": sum(one.numel() for one in parameters if not getattr(one, "allreduce", True)),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": _optimizer_bytes(optimizer, parameters),
        "activations": saved.peak,
        "sent": dict(sent.by_group),
    }


def _optimizer_bytes(optimizer: Any, parameters: list[torch.Tensor]) -> int:
    """Moments and fp32 copies, without what is a view of the weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    found: dict[int, int] = {}
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        held = [value for state in one.optimizer.state.values() for value in state.values()
                if torch.is_tensor(value) and value.dim()]
        held += [parameter for group in one.optimizer.param_groups for parameter in group["params"]]
        for tensor in held:
            if tensor.untyped_storage().data_ptr() not in own:
                found[tensor.data_ptr()] = tensor.nbytes
    return sum(found.values())
