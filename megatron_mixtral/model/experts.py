"""Grouped experts without transformer-engine: all local experts of a layer in one product, their weights in place.

The engine's grouped experts (`TEGroupedMLP`) take two grouped linears as parts; here they are made of
`torch.nn.functional.grouped_mm`. Every expert keeps a parameter of its own, under transformer-engine's name
(`linear_fc1.weight{i}`), so that optimizer, checkpoints and conversions see experts, not stacks. The stack that the
product wants is a view: the parameters are made, and the engine's DDP buffers lay them, one behind the other.

State dicts have the names of the engine's sequential experts (`local_experts.{i}.linear_fc1.weight`), and load those
or transformer-engine's; distributed checkpoints are the same for all three.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch import Tensor

from megatron_mixtral.model.cpu import WeightedSwiGLU, linear_of_few, weighted_swiglu
from megatron_mixtral.runtime import current_device, gpu


def stacked(tensors: Sequence[Tensor]) -> Tensor | None:
    """One [len(tensors), ...] view of contiguous tensors of one shape, or None where they do not lie evenly."""
    first = tensors[0]
    if not all(one.is_contiguous() and one.shape == first.shape for one in tensors):
        return None
    start, size = first.data_ptr(), first.element_size()
    storage = first.untyped_storage().data_ptr()
    step = (tensors[1].data_ptr() - start) // size if len(tensors) > 1 else first.numel()
    even = all(one.untyped_storage().data_ptr() == storage and one.data_ptr() == start + index * step * size
               for index, one in enumerate(tensors))
    return first.as_strided((len(tensors), *first.shape), (step, *first.stride())) if even and step > 0 else None


def products(x_ti: Tensor, counts: list[int], weights_oi: Sequence[Tensor], transpose: bool) -> Tensor:
    """The rows of each group times the group's weight, `counts[g]` rows a group: x W^T if `transpose`, else x W.

    On a GPU one grouped product or a loop of products, whichever is faster there.
    """
    stack = stacked(weights_oi)
    aligned = all(size * x_ti.element_size() % 16 == 0 for size in weights_oi[0].shape)  # what grouped_mm asks of rows
    loop = partial(_one_by_one, x_ti, counts, weights_oi, transpose)
    if stack is None or not aligned or not x_ti.shape[0] or (x_ti.is_cuda and not gpu.groups_are_fast(x_ti.dtype)):
        return loop()
    grouped = partial(torch.nn.functional.grouped_mm, x_ti, stack.transpose(1, 2) if transpose else stack,
                      offs=gpu.group_ends(tuple(counts), x_ti.device))
    if not x_ti.is_cuda:
        return grouped()
    return gpu.fastest(("experts", transpose, stack.shape, x_ti.shape[0].bit_length()), grouped, loop)


def _one_by_one(x_ti: Tensor, counts: list[int], weights_oi: Sequence[Tensor], transpose: bool) -> Tensor:
    out = x_ti.new_empty(x_ti.shape[0], weights_oi[0].shape[0 if transpose else 1])
    for rows, part, weight in zip(x_ti.split(counts), out.split(counts), weights_oi, strict=True):
        torch.mm(rows, weight.t() if transpose else weight, out=part)
    return out


class GroupedProduct(torch.autograd.Function):
    """y = x W^T for the rows of each group with the group's weight [o, i].

    The weight's gradient is added to the engine's gradient buffer (`main_grad`) by the product itself, as the engine's
    convention `grad_added_to_main_grad` allows: it spares a pass over the weights, and on a GPU the rounding
    of a bf16 product. On a CPU only where the buffer has the weight's dtype.
    """

    @staticmethod
    def forward(ctx: Any, x_ti: Tensor, counts: list[int], *weights_oi: Tensor) -> Tensor:
        ctx.counts = counts
        ctx.weights = weights_oi  # the parameters themselves: a saved tensor would come back without `main_grad`
        # Of frozen weights only the input's gradient is wanted, which does not need the input.
        ctx.save_for_backward(x_ti if any(ctx.needs_input_grad[2:]) else x_ti.new_empty(0))
        return products(x_ti.contiguous(), counts, weights_oi, transpose=True)

    @staticmethod
    def backward(ctx: Any, grad_to: Tensor) -> tuple[Tensor | None, ...]:
        [x_ti] = ctx.saved_tensors
        grad_to = grad_to.contiguous()
        grad_x = products(grad_to, ctx.counts, ctx.weights, transpose=False) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return (grad_x, *(None for _ in ctx.needs_input_grad[1:]))
        groups = zip(grad_to.split(ctx.counts), x_ti.split(ctx.counts), ctx.weights, ctx.needs_input_grad[2:],
                     strict=True)
        return (grad_x, None, *(_weight_gradient(*group) for group in groups))


def _weight_gradient(grad_to: Tensor, x_ti: Tensor, weight_oi: Tensor, needed: bool) -> Tensor | None:
    if not needed:
        return None
    main_grad = getattr(weight_oi, "main_grad", None)
    there = main_grad is not None and hasattr(weight_oi, "grad_added_to_main_grad")
    if not there or not (weight_oi.is_cuda or main_grad.dtype == weight_oi.dtype):
        return grad_to.t().mm(x_ti)
    gpu.add_product(main_grad, grad_to, x_ti)
    weight_oi.grad_added_to_main_grad = True
    # DDP's hook wants to see a gradient and drops it unread; an alias of the weight takes no memory.
    return weight_oi.detach()


class GroupedLinear(torch.nn.Module):
    """The linears of all local experts, without bias. `partition_dim` is the side of a weight [o, i] that ETP cuts.

    It stands in the place of transformer-engine's column- and row-parallel grouped linears in the engine's experts; as
    there, the token dispatcher does all communication.
    """

    def __init__(self, num_local_experts: int, input_size: int, output_size: int, *, partition_dim: int,
                 config: TransformerConfig, init_method: Callable[[Tensor], Any], bias: bool, is_expert: bool,
                 pg_collection: ProcessGroupCollection, **kwargs: Any) -> None:
        super().__init__()
        assert is_expert and not bias, "made for the experts of a Mixtral"
        self.count, self.partition_dim, self.groups = num_local_experts, partition_dim, pg_collection
        shape = [output_size, input_size]
        shape[partition_dim] = divide(shape[partition_dim], pg_collection.expt_tp.size())
        whole = torch.empty(num_local_experts, *shape, dtype=config.params_dtype, device=current_device())
        self.own_groups = (config.expert_model_parallel_size > 1
                           or config.expert_tensor_parallel_size != config.tensor_model_parallel_size)
        # The engine's DDP lays parameters out from the last to the first, so the last expert is registered first.
        for index in reversed(range(num_local_experts)):
            weight = torch.nn.Parameter(whole[index])
            # Gate and up are cut apart: two strides in a column-parallel shard of fc1.
            set_tensor_model_parallel_attributes(weight, True, partition_dim, 2 if partition_dim == 0 else 1)
            weight.allreduce = not self.own_groups
            self.register_parameter(f"weight{index}", weight)
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                for weight in self.weights():
                    init_method(weight)

    def weights(self) -> tuple[torch.nn.Parameter, ...]:
        """The weights [o, i] of the local experts, in their order."""
        return tuple(self._parameters[f"weight{index}"] for index in range(self.count))

    def forward(self, x_ti: Tensor, tokens_per_expert: list[int]) -> tuple[Tensor, None]:
        """([t, o], no bias): tokens sorted by expert, `tokens_per_expert` of each."""
        few = 0 < len(x_ti) <= 4 * self.count  # most experts have none, or few
        if few and not (self.training or x_ti.is_cuda or torch.is_grad_enabled()):
            ends = itertools.accumulate(tokens_per_expert)
            return torch.cat([linear_of_few(x_ti[end - count:end], weight) for count, end, weight
                              in zip(tokens_per_expert, ends, self.weights(), strict=True) if count]), None
        return GroupedProduct.apply(x_ti, tokens_per_expert, *self.weights()), None

    def backward_dw(self) -> None:
        """The weights' gradients are there when the backward pass is done."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GroupedLinear":
        """Another device or dtype gives every parameter a storage of its own: put them behind one another again."""
        before = [[one.data_ptr() for one in group] for group in self.stacks()]
        super()._apply(fn, recurse)
        for group, places in zip(self.stacks(), before, strict=True):
            if [one.data_ptr() for one in group] != places and stacked(group) is None:
                for one, part in zip(group, torch.stack([one.detach() for one in group]), strict=True):
                    one.data = part
        return self

    def stacks(self) -> list[tuple[torch.nn.Parameter, ...]]:
        """Parameters that are to lie behind one another."""
        return [self.weights()]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (),
                           metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """Keys and shards of the engine's sequential experts: the experts are an axis of the tensor.

        Raises KeyError without `metadata["dp_cp_group"]`, which the engine's experts always give.
        """
        found: dict[str, Any] = {}
        own, groups = dict(metadata or {}), self.groups
        for index, weight in enumerate(self.weights()):
            expert, experts = groups.ep.rank() * self.count + index, groups.ep.size() * self.count
            apart = own.get("singleton_local_shards", False)
            offsets = sharded_offsets if apart else (*sharded_offsets, (len(sharded_offsets), expert, experts))
            key = f"{expert}.{prefix}" if apart else prefix
            shards = make_sharded_tensors_for_checkpoint(
                {"weight": weight, "_extra_state": None}, key, {"weight": self.partition_dim}, offsets,
                tp_group=groups.expt_tp, dp_cp_group=own["dp_cp_group"])
            for name, shard in zip((f"weight{index}", f"_extra_state{index or ''}"), shards.values(), strict=True):
                shard.replica_id = (*shard.replica_id[:2], groups.expt_dp.rank())
                found[prefix + name] = shard
        return found


class GroupedExperts(TEGroupedMLP):
    """The engine's grouped experts with the linears of this module."""

    def __init__(self, num_local_experts: int, config: TransformerConfig,
                 pg_collection: ProcessGroupCollection | None = None, name: str | None = None,
                 linear: Callable[..., GroupedLinear] = GroupedLinear) -> None:
        parts = GroupedMLPSubmodules(linear_fc1=partial(linear, partition_dim=0),
                                     linear_fc2=partial(linear, partition_dim=1))
        super().__init__(num_local_experts, config, parts, pg_collection, name)
        self.register_state_dict_post_hook(_name_as_sequential)
        self.register_load_state_dict_pre_hook(_name_as_grouped)

    def forward(self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor | list[int],
                permuted_probs: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """([t, h], no bias) of tokens [t, h] sorted by expert, as the engine's, whose counts are a tensor. A CPU has
        its own SwiGLU.
        """
        if permuted_local_hidden_states.is_cuda or self.activation_recompute:
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs, **kwargs)
        counts, rows = tokens_per_expert, None
        if isinstance(counts, Tensor):
            counts = counts.tolist()
        x_th, probs_t = permuted_local_hidden_states, permuted_probs
        if x_th.dtype != torch.float32:
            rows, counts = _rounded_up(counts)
            x_th, probs_t = (one.new_zeros(sum(counts), *one.shape[1:]).index_copy(0, rows, one)
                             for one in (x_th, probs_t))
        swiglu = WeightedSwiGLU.apply if torch.is_grad_enabled() else weighted_swiglu
        gate_and_up, _ = self.linear_fc1(x_th, counts)
        out, _ = self.linear_fc2(swiglu(gate_and_up, probs_t[:, None]), counts)
        return out if rows is None else out.index_select(0, rows), None


def _rounded_up(counts: list[int]) -> tuple[Tensor, list[int]]:
    """(where each token goes if every expert's tokens are filled up with zeros to a multiple of 16, the new counts).

    For products of 16-bit types oneDNN compiles a kernel for each number of rows, in a millisecond and a MiB, and keeps
    a thousand: with the counts as they come, which no two micro-batches share, it would compile nearly every time.
    """
    filled = [-(-count // 16) * 16 for count in counts]
    ends = torch.tensor([counts, filled]).cumsum(1)
    gaps = (ends[1] - ends[0]).roll(1)  # zeros in front of each expert
    gaps[0] = 0
    return torch.arange(int(ends[0, -1])) + gaps.repeat_interleave(torch.tensor(counts)), filled


def _names(module: torch.nn.Module) -> list[tuple[str, str]]:
    """(the stem of its name among sequential experts, its name here) of each weight, as the linears register them."""
    return [(f"local_experts.{index}.{linear}.", f"{linear}.weight{index}")
            for linear in ("linear_fc1", "linear_fc2") for index in reversed(range(module.num_local_experts))]


def _name_as_sequential(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for stem, name in _names(module):
        if prefix + name in state_dict:  # a base of 4 bits has none
            state_dict[f"{prefix}{stem}weight"] = state_dict.pop(prefix + name)
    for index in range(module.num_local_experts):
        for linear in ("linear_fc1", "linear_fc2"):
            state_dict[f"{prefix}local_experts.{index}.{linear}._extra_state"] = None


def _name_as_grouped(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    for key in [key for key in state_dict if key.startswith(prefix) and "_extra_state" in key]:
        del state_dict[key]
    for stem, name in _names(module):
        if f"{prefix}{stem}weight" in state_dict:
            state_dict[prefix + name] = state_dict.pop(f"{prefix}{stem}weight")
