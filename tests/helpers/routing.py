"""One training step seen at its routers: losses, gradients and loads, ours on ranks and those of `transformers`."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from helpers import engine

NAMES = {"mlp.router.weight": "mlp.gate.weight", "input_layernorm.weight": "input_layernorm.weight",
         "pre_mlp_layernorm.weight": "post_attention_layernorm.weight"}


def micro_batches(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """This data-parallel rank's rows of a batch of tokens, labels, loss_mask and padding, each [B, S]."""
    from megatron.core import parallel_state as mpu

    size, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    shares = {name: rows.chunk(size)[rank] for name, rows in batch.items()}
    return [{name: rows[index:index + 1].contiguous() for name, rows in shares.items()}
            for index in range(len(shares["tokens"]))]


def _forward(masks: bool, iterator: Any, model: Any) -> Any:
    from megatron_mixtral.training import masked_sum

    batch = next(iterator)
    positions = torch.arange(batch["tokens"].shape[1])[None]
    given = {"loss_mask": batch["loss_mask"], "padding_mask": batch["padding"]} if masks else {}
    output = model(batch["tokens"], positions, None, labels=batch["labels"], **given)
    return output, partial(masked_sum, loss_mask_bs=batch["loss_mask"])


def step(rank: int, checkpoint: str, layout: dict[str, int], batch: dict[str, torch.Tensor], masks: bool,
         options: dict[str, Any]) -> SimpleNamespace:
    """Forward and backward of a batch, one sequence a micro-batch; `options` are fields of the engine's configuration
    and `pool_aux_loss`. Gives losses as logged, tokens of each expert, and the gradients of this rank's layers.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    from megatron_mixtral.training.metrics import ExpertLoad

    chunks = engine.load_stages(checkpoint, layout, **options)
    config, load = chunks[0].config, ExpertLoad(chunks[0].mixtral.num_hidden_layers, config_experts(chunks), "cpu")
    for chunk in chunks:
        load.watch(chunk)
    chunks = [DistributedDataParallel(config, DistributedDataParallelConfig(), chunk, disable_bucketing=index > 0)
              for index, chunk in enumerate(chunks)]
    config.finalize_model_grads_func = finalize_model_grads
    rows = micro_batches(batch)
    engine._schedule(chunks, rows, partial(_forward, masks), forward_only=False)
    found: dict[str, float] = {}
    get_moe_metrics_tracker().report(
        loss_scale=1 / len(rows), iteration=1, force_initialize=True, num_layers=config.num_layers,
        track_names=["load_balancing_loss", "z_loss"],
        writer=SimpleNamespace(add_scalar=lambda name, value, step: found.update({name: float(value)})))
    gradients = {}
    for chunk in chunks:
        for layer in chunk.module.decoder.layers:
            for name, parameter in layer.named_parameters():
                if name in NAMES:
                    gradients[f"model.layers.{layer.layer_number - 1}.{NAMES[name]}"] = parameter.main_grad.clone()
    assert mpu.get_context_parallel_world_size() == 1
    return SimpleNamespace(aux=found["load_balancing_loss"], z=found["z_loss"], tokens=load.collect(),
                           gradients=gradients)


def config_experts(chunks: list[Any]) -> int:
    return chunks[0].mixtral.num_local_experts


def reference(directory: Any, batch: dict[str, torch.Tensor], *, coefficient: float, z_coefficient: float, pooled: bool,
              per_token: bool) -> SimpleNamespace:
    """The same with `transformers`' model and its `load_balancing_loss_func`, a sequence at a time."""
    from transformers import MixtralForCausalLM
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model = MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    experts, topk = model.config.num_local_experts, model.config.num_experts_per_tok
    layers = model.config.num_hidden_layers
    micro = [{name: rows[index:index + 1] for name, rows in batch.items()} for index in range(len(batch["tokens"]))]
    trained = sum(float(one["loss_mask"].sum()) for one in micro)
    tokens, aux_sum, z_sum = torch.zeros(layers, experts, dtype=torch.int64), 0.0, 0.0
    for one in micro:
        out = model.model(one["tokens"], output_router_logits=True)
        logits = model.lm_head(out.last_hidden_state)
        losses = torch.nn.functional.cross_entropy(logits[0], one["labels"][0], reduction="none") * one["loss_mask"][0]
        valid = (~one["padding"]).float()
        gates = tuple(gate.reshape(-1, experts) for gate in out.router_logits)
        if pooled:
            aux = load_balancing_loss_func(gates, experts, topk, valid)
        else:
            aux = sum(load_balancing_loss_func((gate,), experts, topk, valid) for gate in gates) / topk
        z = sum((gate.logsumexp(-1).square() * valid[0]).sum() / valid.sum() for gate in gates)
        balance = coefficient * aux + z_coefficient * z
        here = one["loss_mask"].sum()
        loss = (losses.sum() + here * balance) / trained if per_token else (losses.sum() / here + balance) / len(micro)
        loss.backward()
        aux_sum, z_sum = aux_sum + float(aux.detach()) / len(micro), z_sum + float(z.detach()) / len(micro)
        for layer, gate in enumerate(gates):
            chosen = gate.topk(topk).indices[valid[0].bool()]
            tokens[layer] += torch.bincount(chosen.flatten(), minlength=experts)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()
                 if any(name.endswith(end) for end in NAMES.values()) and parameter.grad is not None}
    return SimpleNamespace(aux=aux_sum if pooled else aux_sum / layers, z=z_sum / layers, tokens=tokens,
                           gradients=gradients)
