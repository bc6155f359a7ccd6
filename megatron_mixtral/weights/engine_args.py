"""The `args` namespace inside the engine's checkpoints: to and from `MixtralConfig` and `ParallelLayout`.

The engine stores its command line in every checkpoint, compares a few of its values when loading, and can take the
architecture from it (`--use-checkpoint-args`); see `check_checkpoint_args` and `load_args_from_checkpoint` in
`megatron.training.checkpointing`. Attribute names are megatron-core 0.19's; older names are read too.
"""

import argparse
from typing import Any

from megatron_mixtral.config import MixtralConfig, ParallelLayout
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.weights.files.pickle_writer import Global

# Ways of laying out stages that this library does not model, with their harmless values.
_UNSUPPORTED = {
    "pipeline_model_parallel_layout": (None,), "account_for_embedding_in_pipeline_split": (False, None),
    "account_for_loss_in_pipeline_split": (False, None), "mtp_num_layers": (None, 0),
}
# Switches that would make the checkpoint another network, with the values that a Mixtral has.
_MIXTRAL = {
    "swiglu": (True,), "normalization": ("RMSNorm",), "position_embedding_type": ("rope",),
    "add_bias_linear": (False,), "add_qkv_bias": (False, None), "rotary_percent": (1.0,),
    "rotary_interleaved": (False, None), "moe_router_pre_softmax": (False, None),
    "moe_shared_expert_intermediate_size": (None,), "qk_layernorm": (False, None),
}


def _first(args: argparse.Namespace, *names: str, default: Any = None) -> Any:
    """The first of several attributes that is set."""
    return next((getattr(args, name) for name in names if getattr(args, name, None) is not None), default)


def layout_from_args(args: argparse.Namespace, where: str) -> ParallelLayout:
    """The layout that wrote a checkpoint. Raises `CheckpointError` for one this library does not model."""
    for name, harmless in _UNSUPPORTED.items():
        if getattr(args, name, None) not in (*harmless, None):
            raise CheckpointError(f"{where}: was saved with {name} = {getattr(args, name)!r}, which is not supported")
    tp = _first(args, "tensor_model_parallel_size")
    pp = _first(args, "pipeline_model_parallel_size")
    if tp is None or pp is None:
        raise CheckpointError(f"{where}: args has no tensor_model_parallel_size or pipeline_model_parallel_size")
    try:
        return ParallelLayout(
            tp=tp, pp=pp, ep=_first(args, "expert_model_parallel_size", default=1),
            etp=_first(args, "expert_tensor_parallel_size"),
            vpp=_first(args, "virtual_pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank", default=1),
            first=_first(args, "decoder_first_pipeline_num_layers"),
            last=_first(args, "decoder_last_pipeline_num_layers"))
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None


def config_from_args(args: argparse.Namespace, where: str) -> MixtralConfig:
    """The architecture, for checkpoints without a `mixtral_config.json` (written by the engine's own programs).

    `vocab_size` is the padded one where the arguments do not have the true one; padded rows are then exported too.
    """
    for name, expected in _MIXTRAL.items():
        found = getattr(args, name, expected[0])
        if found not in expected:
            raise CheckpointError(f"{where}: not a Mixtral: {name} is {found!r}, expected {expected[0]!r}")
    values = {
        "vocab_size": _first(args, "vocab_size", "padded_vocab_size"),
        "hidden_size": _first(args, "hidden_size"),
        "intermediate_size": _first(args, "moe_ffn_hidden_size", "ffn_hidden_size"),
        "num_hidden_layers": _first(args, "num_layers"),
        "num_attention_heads": _first(args, "num_attention_heads"),
        "num_key_value_heads": _first(args, "num_query_groups") if getattr(args, "group_query_attention", True)
        else _first(args, "num_attention_heads"),
        "num_local_experts": _first(args, "num_experts", "num_moe_experts"),
        "num_experts_per_tok": _first(args, "moe_router_topk"),
        "max_position_embeddings": _first(args, "max_position_embeddings", "seq_length"),
        "rope_theta": _first(args, "rotary_base"),
        "rms_norm_eps": _first(args, "norm_epsilon", "layernorm_epsilon"),
    }
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise CheckpointError(f"{where}: args does not say {', '.join(missing)}; put a mixtral_config.json beside the "
                              "checkpoint")
    window = _first(args, "window_size")
    try:
        return MixtralConfig(
            **values, head_dim=_first(args, "kv_channels"),
            sliding_window=None if window is None else int(window[0]) + 1,
            tie_word_embeddings=not getattr(args, "untie_embeddings_and_output_weights", True))
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None


def make_args(config: MixtralConfig, layout: ParallelLayout, padded_vocab: int, divisible_by: int,
              dtype: str, ckpt_format: str = "torch") -> argparse.Namespace:
    """The namespace for a converted checkpoint: architecture and layout, under the engine's names, to be pickled.

    Rank files name their experts one by one, which the engine reads into its sequential experts only; in a silent
    half-load elsewhere. So they say that these are meant. Distributed checkpoints fit all, and leave it to the run.
    """
    base = config.rope_theta
    experts = {"moe_grouped_gemm": False} if ckpt_format == "torch" else {}
    return argparse.Namespace(
        # Architecture
        num_layers=config.num_hidden_layers, hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size, moe_ffn_hidden_size=config.intermediate_size,
        seq_length=config.max_position_embeddings, max_position_embeddings=config.max_position_embeddings,
        num_attention_heads=config.num_attention_heads, group_query_attention=True,
        num_query_groups=config.num_key_value_heads, kv_channels=config.head_dim,
        position_embedding_type="rope", add_position_embedding=True, use_rotary_position_embeddings=True,
        rotary_base=int(base) if base == int(base) else base, rotary_percent=1.0, rotary_interleaved=False,
        add_bias_linear=False, add_qkv_bias=False, squared_relu=False, swiglu=True,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        normalization="RMSNorm", norm_epsilon=config.rms_norm_eps, layernorm_epsilon=config.rms_norm_eps,
        apply_layernorm_1p=False, apply_query_key_layer_scaling=False, attention_dropout=0.0, hidden_dropout=0.0,
        num_experts=config.num_local_experts, moe_layer_freq=1, moe_router_topk=config.num_experts_per_tok,
        moe_router_pre_softmax=False, moe_router_score_function="softmax", moe_router_enable_expert_bias=False,
        **experts, vocab_size=config.vocab_size, padded_vocab_size=padded_vocab,
        make_vocab_size_divisible_by=divisible_by,
        # Hugging Face's window counts the query itself, the engine's counts the keys to its left.
        window_size=None if config.sliding_window is None else (config.sliding_window - 1, 0),
        # Layout
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=layout.etp,
        decoder_first_pipeline_num_layers=layout.first, decoder_last_pipeline_num_layers=layout.last,
        # Bookkeeping
        ckpt_format=ckpt_format, params_dtype=Global("torch", dtype), bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        iteration=0, consumed_train_samples=0, skipped_train_samples=0, consumed_valid_samples=0)
