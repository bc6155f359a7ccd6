"""The candidates of `train_step.py` that train adapters: this library's LoRA and QLoRA, and PEFT's LoRA.

All have rank 16 on q, k, v, o and on w1, w2, w3 of every expert. PEFT's are on experts that are linears, as in
transformers 4: on the fused experts of transformers 5 it trains other adapters.
"""

import argparse
from typing import Any

import torch
from step_candidates import LEARNING_RATE, Candidate, Engine, NotHere, Transformers, fields_of

from megatron_mixtral.config import AdapterConfig, MixtralConfig, ParallelLayout
from megatron_mixtral.lora import adapted, base_places
from megatron_mixtral.model import transformer_config

RANK = 16


def lora(config: MixtralConfig, layout: ParallelLayout, args: argparse.Namespace, dtype: torch.dtype,
         quantized: bool = False) -> Candidate:
    adapter = AdapterConfig.of(config, rank=RANK, quantized=quantized)
    engine = transformer_config(config, layout, dtype, **{"bias_activation_fusion": True, **fields_of(args)})
    model = adapted(adapter, engine, max_sequence_length=args.sequence, padded_vocab_size=config.vocab_size)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    for place in base_places(model).values() if quantized else ():
        if not isinstance(place, torch.nn.Parameter):
            place.copy_(0.02 * torch.randn(place.shape, dtype=place.dtype))
    return Engine(model, config, args)


def qlora(*arguments: Any) -> Candidate:
    return lora(*arguments, quantized=True)


class _Experts(torch.nn.ModuleList):
    """Linear experts in the place of transformers' fused ones, with their weights."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        for gate_up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True):
            expert = torch.nn.Module()
            for name, weight in zip(("w1", "w3", "w2"), (*gate_up.chunk(2), down), strict=True):
                linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
                linear.weight.data.copy_(weight.detach())
                setattr(expert, name, linear)
            self.append(expert)

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for index, expert in enumerate(self):
            token, rank = torch.where(chosen == index)
            x = hidden[token]
            y = expert.w2(torch.nn.functional.silu(expert.w1(x)) * expert.w3(x)) * weights[token, rank, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


class Peft(Transformers):
    def __init__(self, config: MixtralConfig, args: argparse.Namespace, dtype: torch.dtype) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        super().__init__(config, args, dtype)
        for layer in self.model.model.layers:
            layer.mlp.experts = _Experts(layer.mlp.experts)
        self.model.config.model_type = "linear_experts"  # or PEFT would want the fused experts
        inject_adapter_in_model(LoraConfig(r=RANK, target_modules=[
            "q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"]), self.model)
        self.trained = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, fused=True)

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()


def peft(config: MixtralConfig, layout: ParallelLayout, args: argparse.Namespace, dtype: torch.dtype) -> Candidate:
    if layout.world > 1:
        raise NotHere("it is measured on one rank")
    return Peft(config, args, dtype)
