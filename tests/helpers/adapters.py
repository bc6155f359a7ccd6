"""Adapters on ranks and in PEFT: the same random ones for both, a training step of each, and what came of it.

The referee is PEFT on a Mixtral of `transformers` whose experts are plain linears again: on the fused experts of
transformers 5 PEFT trains another model.
"""

import itertools
import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from helpers import engine

RANK, ALPHA, LR, SEQUENCE = 4, 8, 1e-2, 32
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3")


def write_adapter(directory: Path, hf: Path, targets: tuple[str, ...] = ALL, rank: int = RANK, seed: int = 11,
                  dtype: torch.dtype = torch.float32) -> Path:
    """A PEFT folder of random adapters, B not zero, written with PEFT's own names."""
    from safetensors.torch import save_file

    from megatron_mixtral.config import AdapterConfig, MixtralConfig
    from megatron_mixtral.weights import hf_tensors

    config = AdapterConfig.of(MixtralConfig.from_hf_dir(hf), rank=rank, alpha=ALPHA, targets=targets)
    draw = torch.Generator().manual_seed(seed)
    directory.mkdir(parents=True)
    save_file({name: (0.15 * torch.randn(tensor.shape, generator=draw)).to(dtype)
               for name, tensor in hf_tensors(config).items()}, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": ALPHA, "lora_dropout": 0.0,
        "bias": "none", "target_modules": list(targets), "base_model_name_or_path": str(hf)}))
    return directory


# -- ours ------------------------------------------------------------------------------------------------


def stages(hf: str, adapter: str, layout: dict[str, int], dtype: torch.dtype = torch.float32, quantized: bool = False,
           **overrides: Any) -> list[Any]:
    """This rank's model chunks with base and adapters filled in."""
    import dataclasses

    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes

    from megatron_mixtral.lora import adapted, adapter_places, base_places
    from megatron_mixtral.model import fill, transformer_config
    from megatron_mixtral.weights import open_source
    from megatron_mixtral.weights.plan import padded_vocabulary

    laid, source, adapters = engine.set_up(layout), open_source(hf), open_source(adapter)
    config = dataclasses.replace(adapters.config, quantized=quantized)
    pp, rows, chunks = mpu.get_pipeline_model_parallel_rank(), padded_vocabulary(config, laid), []
    for chunk in range(laid.vpp):
        model = adapted(config, transformer_config(config, laid, dtype, **overrides),
                        max_sequence_length=config.max_position_embeddings, padded_vocab_size=rows,
                        pre_process=laid.is_first(pp, chunk), post_process=laid.is_last(pp, chunk),
                        vp_stage=chunk if laid.vpp > 1 else None)
        coord = laid.coord_of(torch.distributed.get_rank())
        for each, places in ((source, base_places(model)), (adapters, adapter_places(model))):
            fill(model, each, coord, laid, chunk=chunk, padded_vocab=rows, places=places)
        for parameter in model.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        chunks.append(model)
    return chunks


def pieces_of(chunks: list[Any], layout: dict[str, int], values: Any) -> dict[str, tuple[int, torch.Tensor]]:
    """{PEFT's name: (start along the shard dim, this rank's part)} of `values(parameter)` of each adapter."""
    from megatron_mixtral.config import ParallelLayout
    from megatron_mixtral.weights import ShardPlan

    laid, found = ParallelLayout(**layout, world=torch.distributed.get_world_size()), {}
    for number, model in enumerate(chunks):
        parameters = dict(model.named_parameters())
        plan = ShardPlan(model.adapter, laid, laid.coord_of(torch.distributed.get_rank()), number)
        for tensor in plan.tensors():
            view = values(parameters[tensor.name]).detach().float().cpu().reshape(tensor.view)
            sizes = [piece.view[tensor.rule.join_dim] for piece in tensor.pieces] if len(tensor.pieces) > 1 else None
            parts = [view] if sizes is None else view.split(sizes, tensor.rule.join_dim)
            for piece, part in zip(tensor.pieces, parts, strict=True):
                found[piece.name] = (tensor.start, tensor.rule.shard_dim, part.clone())
    return found


def train(rank: int, hf: str, adapter: str, layout: dict[str, int], batches: torch.Tensor, *, optimizer: bool = True,
          overlap: bool = False, lengths: tuple[int, ...] | None = None, masks: torch.Tensor | None = None,
          **options: Any) -> dict[str, Any]:
    """The raw gradients of the first batch, and losses, norms and adapters of Adam's steps on all (`optimizer`).

    `batches` [steps, B, S + 1]. Each row is packed samples of these `lengths`, which do not see one another, or one
    sample. `masks` [B, S] are 1.0 where a row of each batch is trained; by default it is everywhere.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    def wrap(distributed: bool) -> tuple[list[Any], list[Any]]:
        chunks = stages(hf, adapter, layout, **options)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed, overlap_grad_reduce=overlap,
                                            grad_reduce_in_fp32=True)
        chunks[0].config.finalize_model_grads_func = finalize_model_grads
        return chunks, [DistributedDataParallel(chunks[0].config, ddp, chunk, disable_bucketing=index > 0)
                        for index, chunk in enumerate(chunks)]

    bounds = None if lengths is None else torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    step, rows = partial(_forward_loss, bounds), partial(_micro_batches, bounds, masks)
    chunks, wrapped = wrap(distributed=False)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    engine._schedule(wrapped, rows(batches[0]), step, forward_only=False)
    found = {"gradients": pieces_of(chunks, layout, lambda one: one.main_grad)}
    if optimizer:
        chunks, wrapped = wrap(distributed=True)
        found |= _adam(wrapped, [rows(batch) for batch in batches], step)
        found["adapters"] = pieces_of(chunks, layout, lambda one: one)
    return found


def _micro_batches(bounds: torch.Tensor | None, masks: torch.Tensor | None,
                   batch: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """This data-parallel rank's rows of a batch, each a micro-batch; of each this context-parallel rank's chunks."""
    from megatron.core import parallel_state as mpu

    from megatron_mixtral.training import micro_batch

    masks = torch.ones(batch[:, 1:].shape) if masks is None else masks
    own, of = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    return [micro_batch.own_chunks({"tokens": row[None, :-1].contiguous(), "labels": row[None, 1:].contiguous(),
                                    "loss_mask": mask[None]}, bounds)
            for row, mask in zip(batch.chunk(of)[own], masks.chunk(of)[own], strict=True)]


def _forward_loss(bounds: torch.Tensor | None, iterator: Any, model: Any) -> Any:
    """The engine's forward step, as `micro_batch` has it."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_mixtral.training import micro_batch

    batch, packed = dict(next(iterator)), None
    if bounds is not None:
        longest = int(bounds.diff().max())
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest,
                                 max_seqlen_kv=longest)
    places = torch.arange(batch["tokens"].shape[1])[None]  # rotary embeddings count for themselves
    return micro_batch._forward(model, {**batch, "position_ids": places, "packed_seq_params": packed})


def _adam(wrapped: list[Any], batches: list[list[dict[str, torch.Tensor]]], step: Any) -> dict[str, Any]:
    from megatron.core import parallel_state as mpu
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = wrapped[0].config
    bf16 = config.params_dtype == torch.bfloat16
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=LR, weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999, adam_eps=1e-8,
                        clip_grad=1.0, use_distributed_optimizer=True, bf16=bf16, params_dtype=config.params_dtype),
        wrapped)
    for group in optimizer.param_groups:
        group["lr"] = LR
    config.grad_scale_func = optimizer.scale_loss
    losses, norms = [], []
    for batch in batches:
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reduced = engine._schedule(wrapped, batch, step, forward_only=False)
        norms.append(float(optimizer.step()[1]))
        if mpu.is_pipeline_last_stage(ignore_virtual=True):
            total = torch.stack([one["lm loss"] for one in reduced]).sum(0)
            torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
            losses.append(float(total[0] / total[1]))
    return {"losses": losses, "norms": norms}


def join(ranks: list[dict[str, tuple[int, int, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Whole matrices of the ranks' parts. Copies must be equal to the bit."""
    parts: dict[str, dict[int, tuple[int, torch.Tensor]]] = defaultdict(dict)
    for one in ranks:
        for name, (start, dim, part) in one.items():
            if start in parts[name]:
                assert torch.equal(parts[name][start][1], part), f"ranks hold different copies of {name}"
            parts[name][start] = (dim, part)
    return {name: torch.cat([own[start][1] for start in sorted(own)], next(iter(own.values()))[0]).flatten(0, -2)
            for name, own in parts.items()}


# -- PEFT's ----------------------------------------------------------------------------------------------


def peft_model(hf: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' Mixtral with linear experts and PEFT's adapters on them, their values those of a folder."""
    from peft import LoraConfig, inject_adapter_in_model
    from safetensors.torch import load_file
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(hf, dtype=dtype, attn_implementation="eager").eval()
    for layer in model.model.layers:
        layer.mlp.experts = _Experts(layer.mlp.experts)
        layer.mlp.gate = _Router(layer.mlp.gate)
    model.config.model_type = "not_mixtral"  # or PEFT would want the fused experts
    said = json.loads((adapter / "adapter_config.json").read_text())
    inject_adapter_in_model(LoraConfig(r=said["r"], lora_alpha=said["lora_alpha"],
                                       target_modules=[{"gate": "gate.linear"}.get(name, name)
                                                       for name in said["target_modules"]]), model)
    parameters = dict(model.named_parameters())
    for name, value in load_file(adapter / "adapter_model.safetensors").items():
        parameters[inside(name)].data = value.to(dtype)
    return model


@torch.no_grad()
def greedy(model: Any, prompt: list[int], new: int) -> tuple[list[int], torch.Tensor]:
    """So many tokens, and the log-probabilities [new, vocabulary] at their places, the whole text read for each."""
    ids, rows = torch.tensor([prompt]), []
    for _ in range(new):
        rows.append(model(ids, use_cache=False).logits[0, -1].log_softmax(-1))
        ids = torch.cat([ids, rows[-1].argmax().view(1, 1)], dim=1)
    return ids[0, len(prompt):].tolist(), torch.stack(rows)


def inside(name: str) -> str:
    """Where a tensor of a PEFT folder is in `peft_model`."""
    name = name.removeprefix("base_model.model.").replace("block_sparse_moe.experts.", "mlp.experts.experts.")
    name = name.replace("block_sparse_moe.gate.", "mlp.gate.linear.")
    return name.replace(".weight", ".default.weight")


class _Router(torch.nn.Module):
    """The router with a linear inside, which PEFT can adapt."""

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.top_k = router.top_k
        self.linear = torch.nn.Linear(router.weight.shape[1], router.weight.shape[0], bias=False)
        self.linear.weight.data = router.weight.detach().clone()

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = self.linear(hidden.reshape(-1, hidden.shape[-1]))
        weights, chosen = torch.topk(logits.float().softmax(-1), self.top_k, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True), chosen


class _Experts(torch.nn.Module):
    """Experts as transformers 4 had them: three linears each."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList()
        for gate_up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True):
            expert = torch.nn.Module()
            for name, weight in zip(("w1", "w3", "w2"), (*gate_up.chunk(2), down), strict=True):
                linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight.data = weight.detach().clone()
                setattr(expert, name, linear)
            self.experts.append(expert)

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for index, one in enumerate(self.experts):
            token, rank = torch.where(chosen == index)
            x = hidden[token]
            y = one.w2(torch.nn.functional.silu(one.w1(x)) * one.w3(x))
            out = out.index_add(0, token, y * weights[token, rank, None])
        return out


def peft_train(hf: Path, adapter: Path, batches: torch.Tensor, lengths: tuple[int, ...] | None = None,
               masks: torch.Tensor | None = None, calculate_per_token_loss: bool = False,
               **same: Any) -> dict[str, Any]:
    """As `train`, of the whole batch in one process. Packed samples are read each by itself. A step's loss is the mean
    of its rows' means, or that of all trained tokens; the one that is noted is the latter. `same` changes nothing.
    """
    from safetensors.torch import load_file

    model = peft_model(hf, adapter)
    named = {name: model.get_parameter(inside(name)) for name in load_file(adapter / "adapter_model.safetensors")}
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    masks = torch.ones(batches[0][:, 1:].shape) if masks is None else masks
    found: dict[str, Any] = {"losses": [], "norms": []}
    for batch in batches:
        optimizer.zero_grad()
        samples = [batch[:, :-1]] if lengths is None else batch[:, :-1].split(lengths, dim=1)
        logits = torch.cat([model(sample).logits for sample in samples], dim=1)
        losses = masks * torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        of_rows, whole = (losses.sum(1) / masks.sum(1)).mean(), losses.sum() / masks.sum()
        (whole if calculate_per_token_loss else of_rows).backward()
        found.setdefault("gradients", {name: one.grad.clone() for name, one in named.items()})
        found["norms"].append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        found["losses"].append(float(whole.detach()))
        optimizer.step()
    return found | {"adapters": {name: one.detach() for name, one in named.items()}}
