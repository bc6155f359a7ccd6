"""The linears of all local experts with an adapter for each expert, in grouped products like the base's.

fc1 has an A and a B for each of w1 and w3, as PEFT has: the As of an expert behind one another, the Bs in the rows of
its weight. Under expert tensor parallelism A of fc1 and B of fc2 are whole on every rank, and each rank's gradient of
them is of its share of the experts' width: they are added up in backward.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_mixtral.config import AdapterConfig
from megatron_mixtral.lora.linears import Switched, dropped, first_values, trained, zeros
from megatron_mixtral.lora.nf4 import Packed, Slot, packed_experts
from megatron_mixtral.model import experts

product = experts.GroupedProduct.apply


class _Whole(torch.autograd.Function):
    """Matrices that every rank of a group has whole: the same forward, one sum of all their gradients in backward."""

    @staticmethod
    def forward(ctx: Any, group: Any, *matrices: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(one.view_as(one) for one in matrices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        torch.distributed.all_reduce(flat, group=ctx.group)
        parts = flat.split([grad.numel() for grad in grads])
        return (None, *(part.view_as(grad) for part, grad in zip(parts, grads, strict=True)))


class AdaptedExperts(Switched, experts.GroupedLinear):
    """linear_fc1 (`partition_dim` 0) or linear_fc2 (1) of the experts."""

    def __init__(self, num_local_experts: int, input_size: int, output_size: int, *, partition_dim: int,
                 config: TransformerConfig, pg_collection: ProcessGroupCollection, adapter: AdapterConfig,
                 **kwargs: Any) -> None:
        super().__init__(num_local_experts, input_size, output_size, partition_dim=partition_dim, config=config,
                         pg_collection=pg_collection, **first_values(adapter, kwargs))
        self.adapter, self.up, self.packed = adapter, partition_dim == 0, None
        names = [name for name in (("w1", "w3") if self.up else ("w2",)) if name in adapter.targets]
        self.pieces = len(names)
        rows, columns = self.weights()[0].shape
        if adapter.quantized:
            first = self.weights()[0]
            for index in range(num_local_experts):
                delattr(self, f"weight{index}")
            self.packed = Packed((num_local_experts, rows, columns), first.dtype, first.device)
        shapes = {"lora_A": (self.pieces * adapter.rank, columns), "lora_B": (rows, adapter.rank)}
        self.cut = {"lora_A": None if self.up else 1, "lora_B": 0 if self.up else None}
        for name, shape in shapes.items() if names else ():
            whole = zeros(config, num_local_experts, *shape)
            for index in reversed(range(num_local_experts)):  # as the base's, see GroupedLinear
                one = trained(whole[index], config, cut=self.cut[name], allreduce=not self.own_groups)
                self.register_parameter(f"{name}{index}", one)

    def weights(self) -> tuple[torch.nn.Parameter, ...]:
        return () if getattr(self, "packed", None) is not None else super().weights()

    def matrices(self, name: str) -> tuple[torch.nn.Parameter, ...]:
        """lora_A or lora_B of the local experts, in their order."""
        return tuple(self.get_parameter(f"{name}{index}") for index in range(self.count)) if self.pieces else ()

    def stacks(self) -> list[tuple[torch.nn.Parameter, ...]]:
        return [group for group in (self.weights(), self.matrices("lora_A"), self.matrices("lora_B")) if group]

    def places(self) -> dict[str, Any]:
        """What is to be filled with the base's weights, by name."""
        if self.packed is None:
            return {f"weight{index}": weight for index, weight in enumerate(self.weights())}
        return {f"weight{index}": Slot(self.packed, index) for index in range(self.count)}

    def forward(self, x_ti: Tensor, tokens_per_expert: list[int]) -> tuple[Tensor, None]:
        """([t, o], no bias): tokens sorted by expert, `tokens_per_expert` of each."""
        if self.packed is None:
            out, _ = super().forward(x_ti, tokens_per_expert)
        else:
            out = packed_experts(x_ti, tokens_per_expert, self.packed)
        if not (self.pieces and self.is_on):
            return out, None
        # Of fc1 each share of the experts' width has a mask of its own.
        x_ti = dropped(x_ti, self.adapter, self.training, get_expert_parallel_rng_tracker_name())
        low = product(x_ti, tokens_per_expert, *self._given("lora_A"))
        b = self._given("lora_B")
        if not self.up:
            return torch.add(out, product(low, tokens_per_expert, *b), alpha=self.adapter.scale), None
        halves = zip(*(one.chunk(2) for one in b), strict=True)  # rows of w1, rows of w3
        parts = [product(own.contiguous(), tokens_per_expert, *half)
                 for own, half in zip(low.chunk(2, dim=-1), halves, strict=True)]
        return torch.add(out, torch.cat(parts, dim=-1), alpha=self.adapter.scale), None

    def _given(self, name: str) -> tuple[Tensor, ...]:
        """The matrices as a product takes them: those that are whole on every rank with the sum of their gradients."""
        matrices, group = self.matrices(name), self.groups.expt_tp
        return _Whole.apply(group, *matrices) if self.cut[name] is None and group.size() > 1 else matrices

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (),
                           metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """Of the adapters alone, with the experts as an axis, as the base's."""
        found: dict[str, Any] = {}
        own, groups = dict(metadata or {}), self.groups
        for name in self.cut if self.pieces else ():
            for index, matrix in enumerate(self.matrices(name)):
                place = (len(sharded_offsets), groups.ep.rank() * self.count + index, groups.ep.size() * self.count)
                offsets = (*sharded_offsets, place)
                cut = {} if self.cut[name] is None else {name: self.cut[name]}
                [shard] = make_sharded_tensors_for_checkpoint(
                    {name: matrix}, prefix, cut, offsets, tp_group=groups.expt_tp,
                    dp_cp_group=own["dp_cp_group"]).values()
                shard.replica_id = (*shard.replica_id[:2], groups.expt_dp.rank())
                if self.up and name == "lora_B":  # gate and up are cut apart
                    shard = apply_swiglu_sharded_factory(shard, offsets, False, tp_group=groups.expt_tp,
                                                         dp_group=own["dp_cp_group"])
                found[f"{prefix}{name}{index}"] = shard
        return found
