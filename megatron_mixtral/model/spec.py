"""The layer specification: which module stands in which place of the engine's transformer block.

Two sets of parts: the engine's own tensor-parallel linears with this library's norm and attention (needs nothing but
torch), or transformer-engine's. Both write the same keys into distributed checkpoints.
"""

import dataclasses
from functools import partial

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules, RouterBuilder
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_mixtral.model.attention import CausalAttention
from megatron_mixtral.model.experts import GroupedExperts
from megatron_mixtral.model.norm import RMSNorm

# transformer-engine fuses the input norm into the QKV linear and stores it under that name; the local parts have a norm
# of its own. One name on disk makes their distributed checkpoints interchangeable. (The engine's local spec also
# renames pre_mlp_layernorm, which its transformer-engine MoE spec does not: that entry is left out here.)
_TE_KEYS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}


def _local_layer(config: TransformerConfig) -> TransformerLayerSubmodules:
    parts = get_gpt_layer_local_submodules(num_experts=config.num_moe_experts, normalization="RMSNorm")
    attention = parts.self_attention
    attention = dataclasses.replace(
        attention, submodules=dataclasses.replace(attention.submodules, core_attention=CausalAttention))
    mlp = partial(MoELayer, submodules=MoESubmodules(experts=GroupedExperts)) if config.moe_grouped_gemm else parts.mlp
    return dataclasses.replace(parts, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm, self_attention=attention,
                               mlp=mlp, sharded_state_dict_keys_map=_TE_KEYS)


def _with_router(layer: TransformerLayerSubmodules, router: RouterBuilder) -> TransformerLayerSubmodules:
    """The layer with this router in its MoE part, which the engine's specification gives as partial(MoELayer, ...)."""
    parts = dataclasses.replace(layer.mlp.keywords["submodules"], router=router)
    return dataclasses.replace(layer, mlp=partial(layer.mlp.func, **{**layer.mlp.keywords, "submodules": parts}))


def block_spec(config: TransformerConfig, router: RouterBuilder, vp_stage: int | None = None,
               pp_rank: int | None = None) -> TransformerBlockSubmodules:
    """The parts of one pipeline stage's (or model chunk's) transformer block, `router` in each layer.

    `config.transformer_impl` chooses: "local" or "transformer_engine".
    """
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_submodules(
            num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm)
        norm = TENorm
    else:
        layer, norm = _local_layer(config), RMSNorm
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    whole = ModuleSpec(module=TransformerLayer, submodules=_with_router(layer, router))
    return TransformerBlockSubmodules(layer_specs=[whole] * count, layer_norm=norm)
