"""What the engine asks of NCCL and gloo does not have: made of what gloo has.

- split sizes as numpy integers (`all_to_all_single`): gloo's binding accepts Python integers only
- `barrier(device_ids=...)`: NCCL only
- uneven `all_gather` and `reduce_scatter` (lists of tensors of different lengths; the all-to-all dispatcher with
  expert-tensor parallelism): padded to the longest, or reduced whole and sliced
- collectives of the gradient and parameter buffers in a group of one, which gloo copies through its own memory: nothing
"""

from typing import Any

import torch
import torch.distributed as dist

from megatron_mixtral.runtime.replacements import Replacements


def enable(replacements: Replacements) -> None:
    """Replace the public functions of torch.distributed; the engine calls them by module attribute."""
    replacements.wrap(dist, "all_to_all_single", _with_plain_integers)
    replacements.wrap(dist, "barrier", _without_device_ids)
    replacements.wrap(dist, "all_gather", _all_gather_any)
    replacements.wrap(dist, "reduce_scatter", _reduce_scatter_any)


def enable_buffers(replacements: Replacements) -> None:
    """The collectives that the engine's buffers of gradients and parameters took by name when they were imported."""
    from megatron.core.distributed import param_and_grad_buffer

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        replacements.wrap(param_and_grad_buffer, name, _nothing_to_do_alone)


def _nothing_to_do_alone(collective: Any, output: torch.Tensor, input: torch.Tensor, *args: Any, group: Any = None,
                         **kwargs: Any) -> Any:
    if dist.get_world_size(group) > 1:
        return collective(output, input, *args, group=group, **kwargs)
    if output.data_ptr() != input.data_ptr():
        output.copy_(input)
    return None


def _with_plain_integers(all_to_all: Any, output: torch.Tensor, input: torch.Tensor, output_split_sizes: Any = None,
                         input_split_sizes: Any = None, group: Any = None, async_op: bool = False) -> Any:
    plain = [None if sizes is None else [int(size) for size in sizes]
             for sizes in (output_split_sizes, input_split_sizes)]
    return all_to_all(output, input, *plain, group=group, async_op=async_op)


def _without_device_ids(barrier: Any, group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
    return barrier(group=group, async_op=async_op)


def _all_gather_any(all_gather: Any, tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None,
                    async_op: bool = False) -> Any:
    lengths = _lengths(tensor_list)
    if len(set(lengths)) == 1 or async_op:
        return all_gather(tensor_list, tensor, group=group, async_op=async_op)
    longest = max(lengths)
    padded = tensor.new_zeros((longest, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    gathered = [torch.empty_like(padded) for _ in tensor_list]
    all_gather(gathered, padded, group=group)
    for part, whole, length in zip(tensor_list, gathered, lengths, strict=True):
        part.copy_(whole[:length])
    return None


def _reduce_scatter_any(reduce_scatter: Any, output: torch.Tensor, input_list: list[torch.Tensor],
                        op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
    lengths = _lengths(input_list)
    if len(set(lengths)) == 1 or async_op:
        return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
    whole = torch.cat(input_list)
    dist.all_reduce(whole, op=op, group=group)
    output.copy_(whole.split(lengths)[dist.get_rank(group)])
    return None


def _lengths(parts: list[torch.Tensor]) -> list[int]:
    return [part.shape[0] if part.dim() else 1 for part in parts]


def lost_a_rank(error: BaseException) -> bool:
    """Whether a collective failed because a peer has ended, by what gloo and NCCL say then."""
    text = str(error)
    return any(words in text for words in ("Connection closed by peer", "Connection reset by peer", "Broken pipe",
                                           "remote process exited", "Timed out waiting"))
