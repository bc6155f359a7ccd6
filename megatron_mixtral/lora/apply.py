"""A Mixtral with adapters: its parts, what of it is trained, saved and loaded, and where weights are filled in.

Everything but the adapters is frozen. Checkpoints hold the adapters alone; the base is read at every start.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mixtral.config import AdapterConfig
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.lora.experts import AdaptedExperts
from megatron_mixtral.lora.linears import AdaptedProj, AdaptedQKV, AdaptedRouter, Switched
from megatron_mixtral.lora.nf4 import Packed
from megatron_mixtral.model import MixtralModel, build, experts, spec

MARK = "lora_"  # in the name of every trained parameter


class AdaptedModel(MixtralModel):
    """One pipeline stage or model chunk. To checkpoints it is its adapters."""

    adapter: AdapterConfig

    @contextmanager
    def adapters(self, on: bool) -> Iterator[None]:
        """Unless `on`, the network is its base, as long as the context lasts."""
        switched = [] if on else [one for one in self.modules() if isinstance(one, Switched)]
        for one in switched:
            one.is_on = False
        try:
            yield
        finally:
            for one in switched:
                one.is_on = True

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: shard for name, shard in super().sharded_state_dict(*args, **kwargs).items() if MARK in name}

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load exactly the adapters, whatever `strict` says."""
        result = torch.nn.Module.load_state_dict(self, state_dict, strict=False, assign=assign)
        missing = [key for key in result.missing_keys if MARK in key]
        unexpected = [key for key in result.unexpected_keys if "_extra_state" not in key]
        base = [key for key in state_dict if MARK not in key and "_extra_state" not in key]
        if missing or unexpected or base:
            raise CheckpointError(
                f"the checkpoint does not hold this model's adapters: {len(missing)} missing {missing[:3]}, "
                f"{len({*unexpected, *base})} of another kind {[*unexpected, *base][:3]}")
        return result


def adapted(adapter: AdapterConfig, engine: TransformerConfig, **options: Any) -> AdaptedModel:
    """`model.build` with adapters, all zero, and everything else frozen; `options` are that function's."""
    attention, routed = {"q_proj", "k_proj", "v_proj"} & {*adapter.targets}, "gate" in adapter.targets
    known = {"adapter": adapter}
    parts = spec.Parts(
        linear_qkv=partial(AdaptedQKV, **known) if attention or adapter.quantized else None,
        linear_proj=partial(AdaptedProj, **known) if "o_proj" in adapter.targets or adapter.quantized else None,
        experts=partial(experts.GroupedExperts, linear=partial(AdaptedExperts, **known)),
        router=partial(AdaptedRouter, **known) if routed else spec.MixtralRouter)
    model = build(adapter.model, engine, parts=parts, kind=AdaptedModel, **options)
    model.adapter = adapter
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(MARK in name)
    if model.pre_process:
        model.embedding.register_forward_hook(_wants_a_gradient)
    return model


def _wants_a_gradient(embedding: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """A recomputed layer whose input wants no gradient gets none itself, in silence: the engine's checkpoint function
    is told by its inputs, and skips backward. Nothing is below a frozen embedding, so nobody uses this gradient.
    """
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


def base_places(model: torch.nn.Module) -> dict[str, Any]:
    """Where the base's weights go, by the names of `ShardPlan`: parameters, and what packs them. For `model.fill`."""
    found = {name: one for name, one in model.named_parameters() if MARK not in name}
    for name, module in model.named_modules():
        if isinstance(module, AdaptedExperts):
            found |= {f"{name}.{own}": place for own, place in module.places().items()}
        elif isinstance(module, Packed) and name.endswith(".weight"):
            found[name] = module
    return found


def adapter_places(model: torch.nn.Module) -> dict[str, Any]:
    """Where adapters go, by the names of `ShardPlan`. For `model.fill`."""
    return {name: one for name, one in model.named_parameters() if MARK in name}
