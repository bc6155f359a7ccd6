"""The engine's tensor-parallel linears of the attention, and the router, with low-rank adapters beside them.

Subclasses, so that the base keeps its names. What is summed where (arXiv:2106.09685 says nothing of it): of a
column-parallel linear every rank has all of A, applied to its own part of the sequence, and its rows of B; of a
row-parallel one its columns of A, whose outputs are added up before B is applied. A matrix that every rank has gets
a gradient from its part of the sequence only: the engine adds these up where a parameter says `sequence_parallel`.

Shape suffixes: s sequence (of this rank, or the whole), b batch, r rank, n pieces, g query groups of this rank.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch import Tensor
from torch.nn.functional import linear

from megatron_mixtral.config import AdapterConfig
from megatron_mixtral.lora.nf4 import Packed, packed_linear
from megatron_mixtral.model import spec
from megatron_mixtral.runtime import current_device


def zeros(config: TransformerConfig, *shape: int) -> Tensor:
    """What adapters are until they are filled."""
    return torch.zeros(shape, dtype=config.params_dtype, device=current_device())


def trained(matrix: Tensor, config: TransformerConfig, *, cut: int | None = None, partial: bool = False,
            allreduce: bool = True) -> torch.nn.Parameter:
    """A matrix to be trained.

    `cut` is the dim of which this rank holds a part, None where it holds all; `partial` says that its gradient is of
    a part of the sequence; `allreduce` is the engine's for what experts do not have to themselves.
    """
    parameter = torch.nn.Parameter(matrix)
    set_tensor_model_parallel_attributes(parameter, cut is not None, -1 if cut is None else cut, 1)
    parameter.sequence_parallel = partial and config.sequence_parallel
    parameter.allreduce = allreduce
    return parameter


def dropped(x: Tensor, adapter: AdapterConfig, training: bool, numbers: str = "model-parallel-rng") -> Tensor:
    """Dropout with the random numbers of this rank's own, since it holds a part of the sequence or of the width."""
    if not adapter.dropout or not training:
        return x
    with get_cuda_rng_tracker().fork(numbers):
        return torch.nn.functional.dropout(x, adapter.dropout)


def left_alone(weight: Tensor) -> None:
    """The init method of weights that are packed, and so dropped before anything reads them."""


def first_values(adapter: AdapterConfig, options: dict[str, Any]) -> dict[str, Any]:
    """A linear's options, without drawing random numbers for what will be packed."""
    return options | ({"init_method": left_alone} if adapter.quantized else {})


def pack_weight(module: torch.nn.Module) -> None:
    """Put a packed weight, to be filled, in the place of a linear's."""
    weight = module.weight
    del module.weight
    module.weight = Packed(weight.shape, weight.dtype, weight.device)


class Switched:
    """A linear whose adapter can be taken away for a while (`AdaptedModel.adapters`)."""

    is_on = True


class AdaptedQKV(Switched, ColumnParallelLinear):
    """linear_qkv: one A for each of q, k and v that is a target, behind one another, and B in the weight's own rows."""

    def __init__(self, input_size: int, output_size: int, *, adapter: AdapterConfig, config: TransformerConfig,
                 **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **first_values(adapter, kwargs))
        self.adapter, self.local_groups = adapter, divide(adapter.num_key_value_heads, self.tp_group.size())
        per_group = adapter.num_attention_heads // adapter.num_key_value_heads
        self.widths = {"q_proj": per_group * adapter.head_dim, "k_proj": adapter.head_dim, "v_proj": adapter.head_dim}
        self.pieces = [name for name in self.widths if name in adapter.targets]
        if adapter.quantized:
            pack_weight(self)
        if self.pieces:
            rows = self.local_groups * sum(self.widths[name] for name in self.pieces)
            self.lora_A = trained(zeros(config, len(self.pieces) * adapter.rank, input_size), config, partial=True)
            self.lora_B = trained(zeros(config, rows, adapter.rank), config, cut=0)

    def _forward_impl(self, input: Tensor, weight: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(weight, Packed):
            return super()._forward_impl(input, weight, *args, **kwargs)
        return packed_linear(input, weight, **{name: kwargs[name] for name in (
            "sequence_parallel", "allreduce_dgrad", "tp_group")})

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> [s, b, g * (q + k + v)] of the whole sequence, as the engine's."""
        out, bias = super().forward(input_, *args, **kwargs)
        if not (self.pieces and self.is_on):
            return out, bias
        low = linear(dropped(input_, self.adapter, self.training), self.lora_A)  # [s, b, n * r]
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        return torch.add(out, self._joined(low), alpha=self.adapter.scale), bias

    def _joined(self, low_sbr: Tensor) -> Tensor:
        """Each piece's B times its low-rank part, in the order of the weight's rows; zeros for what is no target."""
        widths = [self.widths[name] for name in self.pieces]
        rows = self.lora_B.unflatten(0, (self.local_groups, -1)).split(widths, dim=1)
        found = {name: linear(low, own.flatten(0, 1)).unflatten(-1, (self.local_groups, -1))
                 for name, low, own in zip(self.pieces, low_sbr.split(self.adapter.rank, -1), rows, strict=True)}
        shape = (*low_sbr.shape[:-1], self.local_groups)
        parts = [found[name] if name in found else low_sbr.new_zeros(*shape, width)
                 for name, width in self.widths.items()]
        return torch.cat(parts, dim=-1).flatten(-2)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (),
                           metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """Of the adapters alone."""
        return shards_of(self, prefix, {"lora_B": 0}, sharded_offsets, metadata)


class AdaptedProj(Switched, RowParallelLinear):
    """linear_proj with the adapter of o_proj."""

    def __init__(self, input_size: int, output_size: int, *, adapter: AdapterConfig, config: TransformerConfig,
                 **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **first_values(adapter, kwargs))
        self.adapter = adapter
        if adapter.quantized:
            pack_weight(self)
        self.adapts = "o_proj" in adapter.targets
        if self.adapts:
            self.lora_A = trained(zeros(config, adapter.rank, self.input_size_per_partition), config, cut=1)
            self.lora_B = trained(zeros(config, output_size, adapter.rank), config, partial=True)

    def _forward_impl(self, input: Tensor, weight: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(weight, Packed):
            return super()._forward_impl(input, weight, *args, **kwargs)
        return packed_linear(input, weight, sequence_parallel=False, allreduce_dgrad=False, tp_group=None)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, q] of this rank's heads -> [s, b, h], as the engine's."""
        out, bias = super().forward(input_)
        if not (self.adapts and self.is_on):
            return out, bias
        low = linear(dropped(input_, self.adapter, self.training), self.lora_A)
        reduce = (reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else
                  reduce_from_tensor_model_parallel_region)
        return torch.add(out, linear(reduce(low, group=self.tp_group), self.lora_B), alpha=self.adapter.scale), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (),
                           metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """Of the adapters alone."""
        return shards_of(self, prefix, {"lora_A": 1}, sharded_offsets, metadata)


class AdaptedRouter(Switched, spec.MixtralRouter):
    """The router with the adapter of `gate`."""

    def __init__(self, config: TransformerConfig, *args: Any, adapter: AdapterConfig, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.adapter = adapter
        self.lora_A = trained(zeros(config, adapter.rank, adapter.hidden_size), config, partial=True)
        self.lora_B = trained(zeros(config, adapter.num_local_experts, adapter.rank), config, partial=True)

    def gating(self, input: Tensor) -> Tensor:
        """[s, b, h] -> logits [s, b, experts] in the router's type."""
        logits = super().gating(input)
        if not self.is_on:
            return logits
        x = dropped(input, self.adapter, self.training).to(logits.dtype)
        low = linear(linear(x, self.lora_A.to(logits.dtype)), self.lora_B.to(logits.dtype))
        return torch.add(logits, low, alpha=self.adapter.scale)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (),
                           metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """Of the adapters alone."""
        return shards_of(self, prefix, {}, sharded_offsets, metadata)


def shards_of(module: torch.nn.Module, prefix: str, cut: dict[str, int], offsets: tuple,
              metadata: dict[str, Any] | None) -> dict[str, Any]:
    """A module's own adapters as shards of a distributed checkpoint; `cut` has the dims that TP cuts."""
    own = {name: one for name, one in module.named_parameters(recurse=False) if name.startswith("lora_")}
    return make_sharded_tensors_for_checkpoint(own, prefix, cut, offsets, tp_group=getattr(module, "tp_group", None),
                                               dp_cp_group=(metadata or {})["dp_cp_group"])
