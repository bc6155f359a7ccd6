"""Bodies that run on ranks: build a Mixtral in a layout, load a checkpoint, look at its logits, train it.

They use the engine's own schedules, DDP, optimizer and file names, as `megatron.training` does, without its flags.
"""

import math
from functools import partial
from typing import Any

import torch


def set_up(layout: dict[str, int]) -> Any:
    """Process groups of a layout on all ranks of the pool; returns the `ParallelLayout`."""
    from megatron.core import parallel_state, tensor_parallel

    from megatron_mixtral.config import ParallelLayout

    laid = ParallelLayout(**layout, world=torch.distributed.get_world_size())
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        laid.tp, laid.pp, laid.vpp if laid.vpp > 1 else None, context_parallel_size=laid.cp,
        expert_model_parallel_size=laid.ep, expert_tensor_parallel_size=laid.etp,
        create_gloo_process_groups=torch.distributed.get_backend() != "fake")
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    return laid


def load_stages(checkpoint: str, layout: dict[str, int], dtype: torch.dtype = torch.float32,
                pool_aux_loss: bool = False, **overrides: Any) -> list[Any]:
    """This rank's model chunks, filled from the rank directories `checkpoint` by the engine's own file name."""
    from megatron.core import parallel_state as mpu
    from megatron.training.checkpointing import get_checkpoint_name

    from megatron_mixtral.config import MixtralConfig
    from megatron_mixtral.model import build, transformer_config
    from megatron_mixtral.weights.plan import padded_vocabulary

    laid = set_up(layout)
    config = MixtralConfig.from_checkpoint(checkpoint)
    state = torch.load(get_checkpoint_name(checkpoint, 0, release=True), weights_only=False)
    pp, chunks = mpu.get_pipeline_model_parallel_rank(), []
    for chunk in range(laid.vpp):
        model = build(config, transformer_config(config, laid, dtype, **overrides),
                      max_sequence_length=config.max_position_embeddings,
                      padded_vocab_size=padded_vocabulary(config, laid),
                      pre_process=laid.is_first(pp, chunk), post_process=laid.is_last(pp, chunk),
                      vp_stage=chunk if laid.vpp > 1 else None, pool_aux_loss=pool_aux_loss)
        model.to(torch.cuda.current_device(), dtype)
        model.load_state_dict(state["model" if laid.vpp == 1 else f"model{chunk}"], strict=True)
        # As megatron.training.get_model does: parameters that no tensor-parallel layer made have the defaults.
        from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes

        for parameter in model.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        chunks.append(model)
    return chunks


def _micro_batches(batch_bs: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """This data-parallel rank's share of a global batch [B, S + 1], one sequence a micro-batch; of each sequence the
    chunks of this context-parallel rank.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.utils import get_batch_on_this_cp_rank

    share = batch_bs.chunk(mpu.get_data_parallel_world_size())[mpu.get_data_parallel_rank()]
    device = torch.cuda.current_device()
    rows = [{"tokens": row[None, :-1].contiguous().to(device), "labels": row[None, 1:].contiguous().to(device)}
            for row in share]
    return [get_batch_on_this_cp_rank(row, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
            for row in rows]


def _schedule(chunks: list[Any], micro: list[dict[str, torch.Tensor]], forward_step: Any, **options: Any) -> list[Any]:
    """The engine's schedule on these micro-batches, of sequences as long as the first or `seq_length`."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    iterators = [iter(micro) for _ in chunks]
    options.setdefault("seq_length", micro[0]["tokens"].shape[1] * chunks[0].config.context_parallel_size)
    return get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0], num_microbatches=len(micro), micro_batch_size=1, **options)


def _forward_logits(iterator: Any, model: Any) -> Any:
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    batch = next(iterator)
    tokens = batch["tokens"]
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    output = model(tokens, positions, None)
    return output, lambda logits, non_loss_data=False: gather_from_tensor_model_parallel_region(logits).cpu()


def _forward_loss(iterator: Any, model: Any) -> Any:
    from megatron.core import parallel_state as mpu

    from megatron_mixtral.training import masked_sum

    batch = next(iterator)
    tokens, labels = batch["tokens"], batch["labels"]
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    return model(tokens, positions, None, labels=labels), partial(
        masked_sum, loss_mask_bs=torch.ones_like(labels), shared_by=mpu.get_context_parallel_group())


def logits(rank: int, checkpoint: str, layout: dict[str, int], batch_bs: torch.Tensor) -> torch.Tensor | None:
    """Logits [B / dp, S, V] of this data-parallel rank's share on the last stage's first tensor-parallel rank."""
    chunks = load_stages(checkpoint, layout)
    for model in chunks:
        model.eval()
    return logits_of(chunks, batch_bs)


def logits_of(chunks: list[Any], batch_bs: torch.Tensor) -> torch.Tensor | None:
    """As `logits`, of model chunks that are there already."""
    from megatron.core import parallel_state as mpu

    with torch.no_grad():
        found = _schedule(chunks, _micro_batches(batch_bs), _forward_logits, forward_only=True,
                          collect_non_loss_data=True)
    first = mpu.is_pipeline_last_stage() and mpu.get_tensor_model_parallel_rank() == 0
    return torch.cat(found) if first and found else None


def train(rank: int, checkpoint: str, layout: dict[str, int], batches: torch.Tensor, learning_rate: float,
          clip: float = 1.0, overlap: bool = False,
          skip_threshold: float = math.inf, **overrides: Any) -> tuple[list[float], list[float]] | None:
    """Train one step on each batch of `batches` [steps, B, S + 1] with the engine's DDP, distributed optimizer and
    schedule; the losses and gradient norms of the steps, from the last stage.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    chunks = load_stages(checkpoint, layout, **overrides)
    config = chunks[0].config
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=overlap)
    chunks = [DistributedDataParallel(config, ddp, chunk, disable_bucketing=index > 0)
              for index, chunk in enumerate(chunks)]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=learning_rate, weight_decay=0.01, adam_beta1=0.9, adam_beta2=0.95,
                        adam_eps=1e-8, clip_grad=clip, use_distributed_optimizer=True,
                        grad_norm_skip_threshold=skip_threshold), chunks)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    losses, norms = [], []
    for batch in batches:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reduced = _schedule(chunks, _micro_batches(batch), _forward_loss, forward_only=False)
        _, norm, _ = optimizer.step()
        norms.append(float(norm))
        if mpu.is_pipeline_last_stage(ignore_virtual=True):
            total = torch.stack([one["lm loss"] for one in reduced]).sum(0)
            torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
            losses.append(float(total[0] / total[1]))
    return (losses, norms) if losses else None
