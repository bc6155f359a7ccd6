"""The layer specification: which module stands in which place of the engine's transformer block.

Two sets of parts: the engine's own tensor-parallel linears with this library's norm and attention (needs nothing but
torch), or transformer-engine's. Both write the same keys into distributed checkpoints.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_mixtral.errors import ConfigError
from megatron_mixtral.model.attention import CausalAttention
from megatron_mixtral.model.experts import GroupedExperts
from megatron_mixtral.model.norm import RMSNorm
from megatron_mixtral.model.router import MixtralRouter

# transformer-engine fuses the input norm into the QKV linear and stores it under that name; the local parts have a norm
# of its own. One name on disk makes their distributed checkpoints interchangeable. (The engine's local spec also
# renames pre_mlp_layernorm, which its transformer-engine MoE spec does not: that entry is left out here.)
_TE_KEYS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}


@dataclass(frozen=True)
class Parts:
    """What stands in a layer's places. A room above this one gives others (`lora`: linears with adapters)."""

    linear_qkv: Any = None  # None: the engine's
    linear_proj: Any = None
    experts: Any = GroupedExperts
    router: Any = MixtralRouter


def _local_layer(config: TransformerConfig, parts: Parts) -> TransformerLayerSubmodules:
    layer = get_gpt_layer_local_submodules(num_experts=config.num_moe_experts, normalization="RMSNorm")
    attention = layer.self_attention
    own = {name: part for name in ("linear_qkv", "linear_proj") if (part := getattr(parts, name)) is not None}
    attention = dataclasses.replace(
        attention, submodules=dataclasses.replace(attention.submodules, core_attention=CausalAttention, **own))
    mlp = partial(MoELayer, submodules=MoESubmodules(experts=parts.experts)) if config.moe_grouped_gemm else layer.mlp
    return dataclasses.replace(layer, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm, self_attention=attention,
                               mlp=mlp, sharded_state_dict_keys_map=_TE_KEYS)


def _with_router(layer: TransformerLayerSubmodules, router: Any) -> TransformerLayerSubmodules:
    """The layer with this router in its MoE part, which the engine's specification gives as partial(MoELayer, ...)."""
    parts = dataclasses.replace(layer.mlp.keywords["submodules"], router=router)
    return dataclasses.replace(layer, mlp=partial(layer.mlp.func, **{**layer.mlp.keywords, "submodules": parts}))


def block_spec(config: TransformerConfig, parts: Parts, vp_stage: int | None = None,
               pp_rank: int | None = None) -> TransformerBlockSubmodules:
    """The specification of one pipeline stage's (or model chunk's) transformer block.

    `config.transformer_impl` chooses: "local" or "transformer_engine". Raises `ConfigError` where it has no place for
    a part.
    """
    fixed = dataclasses.replace(parts, router=None) != Parts(router=None)
    if fixed and (config.transformer_impl != "local" or not config.moe_grouped_gemm):
        raise ConfigError("adapters need --transformer-impl local and grouped experts: transformer-engine's linears "
                          "and the engine's sequential experts have no place for them; drop --no-moe-grouped-gemm and "
                          f"the flag that chose {config.transformer_impl}")
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_submodules(
            num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm)
        norm = TENorm
    else:
        layer, norm = _local_layer(config, parts), RMSNorm
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    whole = ModuleSpec(module=TransformerLayer, submodules=_with_router(layer, parts.router))
    return TransformerBlockSubmodules(layer_specs=[whole] * count, layer_norm=norm)
