"""One micro-batch: the datasets that it comes from, its way through the model, and its loss.

`training/pretrain.py` hands these functions to the engine: those for plain text, or those for instruction data
(`--is-instruction-dataset`). Of instruction data every pipeline stage reads the rows, since every stage attends within
the samples of a row and keeps padding out of its routers' balancing losses.
"""

from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args, get_timers, get_tokenizer
from megatron.training.utils import is_first_or_last_pipeline_stage

from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.data.datasets import blend_of, build_instruction, build_pretraining, instruction_blend
from megatron_mixtral.runtime import current_device

Rows = Iterator[dict[str, torch.Tensor]]

_BATCH = ("tokens", "labels", "loss_mask", "position_ids")


def datasets(args: Namespace, samples: Any, vp_stage: int | None = None) -> Any:
    """The engine's datasets provider: training, validation and test set. Each rank that reads does so for itself: the
    files are memory-mapped, so this costs less than a broadcast of every batch.
    """
    blend = instruction_blend if args.is_instruction_dataset else blend_of
    per_split = [args.train_data_path, args.valid_data_path, args.test_data_path]
    blends = [blend(words) for words in per_split] if any(per_split) else None
    common = {"tokenizer": get_tokenizer(), "seq_length": args.seq_length, "seed": args.seed,
              "blend": blend(args.data_path), "blend_per_split": blends,
              "split": args.split if blends is None else None, "cache": args.data_cache_path}
    if args.is_instruction_dataset:
        return build_instruction(samples, **common, is_built_on_rank=lambda: True,
                                 multiple=ParallelLayout(cp=args.context_parallel_size).chunks)
    return build_pretraining(
        samples, **common, is_built_on_rank=lambda: _reads(args, vp_stage),
        reset_position_ids=args.reset_position_ids, reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss, mmap_bin_files=args.mmap_bin_files,
        num_dataset_builder_threads=args.num_dataset_builder_threads)


def _reads(args: Namespace, vp_stage: int | None) -> bool:
    """Whether this stage needs batches: the first and the last, and all whose routers must know the trained tokens."""
    return is_first_or_last_pipeline_stage(vp_stage) or (args.calculate_per_token_loss and args.eod_mask_loss)


def text_step(data_iterator: Rows | None, model: Any, return_schedule_plan: bool = False) -> tuple[Any, Any]:
    """The engine's forward step for plain text: (token losses or hidden states, the function that makes the loss). With
    `return_schedule_plan` the losses are not yet computed: in their place is a plan of the pieces of the forward pass.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = _text_batch(data_iterator, _reads(get_args(), get_attr_wrapped_model(model, "vp_stage")))
    timers("batch-generator").stop()
    return _forward(model, batch, return_schedule_plan)


def instruction_step(data_iterator: Rows, model: Any, return_schedule_plan: bool = False) -> tuple[Any, Any]:
    """The same for instruction data."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    rows, device = next(data_iterator), next(model.parameters()).device
    batch = own_chunks({name: rows[name] for name in (*_BATCH, "padding_mask")}, _packed_bounds(rows))
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    packed = packed_params(rows, device)
    timers("batch-generator").stop()
    return _forward(model, {**batch, "packed_seq_params": packed}, return_schedule_plan)


def _forward(model: Any, batch: dict[str, Any], plan: bool = False) -> tuple[Any, Any]:
    call = model.build_schedule_plan if plan else model
    output = call(batch.pop("tokens"), batch.pop("position_ids"), None, **batch)
    per_token = get_attr_wrapped_model(model, "config").calculate_per_token_loss
    return output, partial(masked_sum, loss_mask_bs=batch["loss_mask"],
                           shared_by=None if per_token else mpu.get_context_parallel_group())


def _text_batch(data_iterator: Rows | None, reads: bool) -> dict[str, Any]:
    """The next micro-batch on this rank's device: each [micro_batch, sequence], or None in the middle stages."""
    if data_iterator is None or not reads:
        return dict.fromkeys(_BATCH)
    sample = next(data_iterator)
    batch = own_chunks({name: sample[name] for name in _BATCH})
    return {name: tensor.to(current_device(), non_blocking=True) for name, tensor in batch.items()}


def own_chunks(batch: dict[str, torch.Tensor], bounds: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """This context-parallel rank's two chunks of each sequence (`model/attention.py` says which), each tensor [b, s] of
    the batch cut alike. `bounds` are those of the sequences in the one row of a packed batch.
    """
    group = mpu.get_context_parallel_group()
    if group.size() == 1:
        return batch
    if bounds is None:
        cut = get_batch_on_this_cp_rank({**batch, "cu_seqlens": None}, is_hybrid_cp=False, cp_group=group)
        return {name: cut[name] for name in batch}
    # The engine leaves this to transformer-engine (thd_get_partitioned_indices).
    lengths = bounds.diff().long()
    place = torch.arange(int(bounds[-1])) - bounds[:-1].repeat_interleave(lengths)
    chunk = place * 2 * group.size() // lengths.repeat_interleave(lengths)
    own = ((chunk == group.rank()) | (chunk == 2 * group.size() - 1 - group.rank())).nonzero()[:, 0]
    return {name: tensor.index_select(1, own) for name, tensor in batch.items()}


def _packed_bounds(rows: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Where the sequences of a packed row end, from 0; None where each row is one sample."""
    return None if int(rows["samples"].max()) == 1 else torch.unique_consecutive(rows["cu_seqlens"][0])


def packed_params(rows: dict[str, torch.Tensor], device: torch.device) -> PackedSeqParams | None:
    """The bounds within which a row's tokens attend and their positions count; None where each row is one sample.

    There the causal mask is enough, since padding stands behind the sample. In a packed row the padding is the last
    sequence. `rows` is a micro-batch of `instruction.row_tensors`, on the CPU.
    """
    bounds = _packed_bounds(rows)
    if bounds is None:
        return None
    assert rows["tokens"].shape[0] == 1, "preflight refuses micro-batches of several packed rows"
    longest = int(bounds.diff().max())
    bounds = bounds.to(device, non_blocking=True)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest,
                           max_seqlen_kv=longest)


def masked_sum(losses_bs: torch.Tensor, loss_mask_bs: torch.Tensor,
               shared_by: Any = None) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """The language-model loss, in the form that the engine's schedules reduce: the sum of the token losses that the
    mask keeps.

    `losses_bs` [batch, sequence] are cross entropies in nats, `loss_mask_bs` [batch, sequence] is 1.0 or 0.0.
    Returns (sum, number of kept tokens as an int tensor, {"lm loss": [sum, number]}): the engine divides by the number,
    per micro-batch or (`--calculate-per-token-loss`) over the global batch, and logs sum / number over all of it.

    Of a micro-batch that context-parallel ranks have in chunks, each with a number of its own, the engine would divide
    by the own one: `shared_by` is their group where it divides per micro-batch. The number is then theirs together, and
    the sum counts once for each of them, since the engine takes the mean of their gradients.
    """
    mask = loss_mask_bs.reshape(-1).float()
    total = torch.sum(losses_bs.reshape(-1).float() * mask)
    count = mask.sum().to(torch.int)
    logged = {"lm loss": torch.stack((total.detach(), count.to(total.dtype)))}
    if shared_by is not None and shared_by.size() > 1:
        torch.distributed.all_reduce(count, group=shared_by)
        total = total * shared_by.size()
    return total, count, logged
