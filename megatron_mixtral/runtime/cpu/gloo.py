"""What the engine asks of NCCL and gloo does not have: made of what gloo has.

- split sizes as numpy integers (`all_to_all_single`): gloo's binding accepts Python integers only
- `barrier(device_ids=...)`: NCCL only
- uneven `all_gather` and `reduce_scatter` (lists of tensors of different lengths; the all-to-all dispatcher with
  expert-tensor parallelism): padded to the longest, or reduced whole and sliced
- collectives of the gradient and parameter buffers in a group of one, which gloo copies through its own memory: nothing
"""

import functools
from typing import Any

import torch
import torch.distributed as dist

from megatron_mixtral.runtime.replacements import Replacements


def enable(replacements: Replacements) -> None:
    """Replace the public functions of torch.distributed; the engine calls them by module attribute."""
    replacements.set(dist, "all_to_all_single", _with_plain_integers(dist.all_to_all_single))
    replacements.set(dist, "barrier", _without_device_ids(dist.barrier))
    replacements.set(dist, "all_gather", _all_gather_any(dist.all_gather))
    replacements.set(dist, "reduce_scatter", _reduce_scatter_any(dist.reduce_scatter))


def enable_buffers(replacements: Replacements) -> None:
    """The collectives that the engine's buffers of gradients and parameters took by name when they were imported."""
    from megatron.core.distributed import param_and_grad_buffer

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        replacements.set(param_and_grad_buffer, name, _nothing_to_do_alone(getattr(param_and_grad_buffer, name)))


def _nothing_to_do_alone(function: Any) -> Any:
    @functools.wraps(function)
    def collective(output: torch.Tensor, input: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if dist.get_world_size(group) > 1:
            return function(output, input, *args, group=group, **kwargs)
        if output.data_ptr() != input.data_ptr():
            output.copy_(input)
        return None

    return collective


def _with_plain_integers(function: Any) -> Any:
    @functools.wraps(function)
    def all_to_all_single(output: torch.Tensor, input: torch.Tensor, output_split_sizes: Any = None,
                          input_split_sizes: Any = None, group: Any = None, async_op: bool = False) -> Any:
        plain = [None if sizes is None else [int(size) for size in sizes]
                 for sizes in (output_split_sizes, input_split_sizes)]
        return function(output, input, *plain, group=group, async_op=async_op)

    return all_to_all_single


def _without_device_ids(function: Any) -> Any:
    @functools.wraps(function)
    def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return function(group=group, async_op=async_op)

    return barrier


def _all_gather_any(function: Any) -> Any:
    @functools.wraps(function)
    def all_gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None,
                   async_op: bool = False) -> Any:
        lengths = [part.shape[0] if part.dim() else 1 for part in tensor_list]
        if len(set(lengths)) == 1 or async_op:
            return function(tensor_list, tensor, group=group, async_op=async_op)
        longest = max(lengths)
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(padded) for _ in tensor_list]
        function(gathered, padded, group=group)
        for part, whole, length in zip(tensor_list, gathered, lengths, strict=True):
            part.copy_(whole[:length])
        return None

    return all_gather


def _reduce_scatter_any(function: Any) -> Any:
    @functools.wraps(function)
    def reduce_scatter(output: torch.Tensor, input_list: list[torch.Tensor], op: Any = dist.ReduceOp.SUM,
                       group: Any = None, async_op: bool = False) -> Any:
        lengths = [part.shape[0] if part.dim() else 1 for part in input_list]
        if len(set(lengths)) == 1 or async_op:
            return function(output, input_list, op=op, group=group, async_op=async_op)
        whole = torch.cat(input_list)
        dist.all_reduce(whole, op=op, group=group)
        output.copy_(whole.split(lengths)[dist.get_rank(group)])
        return None

    return reduce_scatter


def lost_a_rank(error: BaseException) -> bool:
    """Whether a collective failed because a peer has ended, by what gloo and NCCL say then."""
    text = str(error)
    return any(words in text for words in ("Connection closed by peer", "Connection reset by peer", "Broken pipe",
                                           "remote process exited", "Timed out waiting"))
