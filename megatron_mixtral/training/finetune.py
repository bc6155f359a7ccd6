"""Fine-tuning on instruction data (`--is-instruction-dataset`): its datasets, batches and forward step.

`training/pretrain.py` puts these in the place of those for plain text. Every pipeline stage reads the data, since every
stage attends within the samples of a row and keeps padding out of its routers' balancing losses.
"""

from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.training import get_timers, get_tokenizer

from megatron_mixtral.data.datasets import build_instruction, instruction_blend
from megatron_mixtral.training.loss import masked_sum

_TENSORS = ("tokens", "labels", "loss_mask", "position_ids", "padding_mask")


def datasets(args: Namespace, samples: Any, vp_stage: int | None = None) -> Any:
    """The engine's datasets provider: train, validation and test rows on every rank."""
    per_split = [args.train_data_path, args.valid_data_path, args.test_data_path]
    blends = [instruction_blend(words) for words in per_split] if any(per_split) else None
    return build_instruction(
        samples, tokenizer=get_tokenizer(), seq_length=args.seq_length, seed=args.seed,
        blend=instruction_blend(args.data_path), blend_per_split=blends, split=args.split if blends is None else None,
        cache=args.data_cache_path, is_built_on_rank=lambda: True)


def forward_step(data_iterator: Iterator[dict[str, Any]], model: Any) -> tuple[Any, Any]:
    """The engine's forward step: (token losses or hidden states, the function that makes the loss of them)."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    rows = next(data_iterator)
    device = next(model.parameters()).device
    packed = packed_params(rows, device)
    batch = {name: rows[name].to(device, non_blocking=True) for name in _TENSORS}
    timers("batch-generator").stop()
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed,
                   loss_mask=batch["loss_mask"], padding_mask=batch["padding_mask"])
    return output, partial(masked_sum, loss_mask_bs=batch["loss_mask"])


def packed_params(rows: dict[str, torch.Tensor], device: torch.device) -> PackedSeqParams | None:
    """The bounds within which a row's tokens attend and their positions count; None where each row is one sample.

    There the causal mask is enough, since padding stands behind the sample. In a packed row the padding is the last
    sequence. `rows` is a micro-batch of `row_tensors`, on the CPU.
    """
    if int(rows["samples"].max()) == 1:
        return None
    assert rows["tokens"].shape[0] == 1, "preflight refuses micro-batches of several packed rows"
    bounds = torch.unique_consecutive(rows["cu_seqlens"][0])
    longest = int(bounds.diff().max())
    bounds = bounds.to(device, non_blocking=True)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest,
                           max_seqlen_kv=longest)
