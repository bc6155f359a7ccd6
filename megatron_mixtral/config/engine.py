"""THE table: what a `MixtralConfig` is in the engine's arguments, both ways, and which switches make another model.

Everybody who speaks to the engine about the architecture comes here: training (defaults of the parser, flags that
contradict), `model/builder.py` (`TransformerConfig`), the sinks (arguments in a converted checkpoint), and every reader
of the arguments in a checkpoint. So what training refuses, export and inspection refuse too.

Names are argparse dests of megatron-core 0.19 (`megatron.training.arguments`); older names are read too. Standard
library only.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mixtral.config.layout import ParallelLayout
from megatron_mixtral.config.mixtral import CONFIG_FILE, MixtralConfig
from megatron_mixtral.errors import CheckpointError, ConfigError

# -- the window rule ---------------------------------------------------------------------------------------


def window_size(sliding_window: int | None) -> tuple[int, int] | None:
    """Hugging Face's window, which counts the query itself, as the engine's (keys to the left, keys to the right)."""
    return None if sliding_window is None else (sliding_window - 1, 0)


def sliding_window(window: Any) -> int | None:
    """The inverse of `window_size`; a negative number of keys to the left is no window."""
    return None if window is None or window[0] < 0 else int(window[0]) + 1


# -- the table ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One argument of the engine. Its value is that of a `MixtralConfig` field, or `value` in every Mixtral."""

    argument: str
    field: str | None = None
    value: Any = None
    transformer: str | None = ""  # its name in TransformerConfig, "" for the same; None: it is no field there
    flag: bool = True  # a run has this flag, and may not say otherwise
    read: bool = True  # saved arguments that say otherwise are another model's
    write: Callable[[Any], Any] = lambda value: value  # from the field's value to the argument's
    back: Callable[[Any], Any] = lambda value: value


TABLE: tuple[Row, ...] = (
    Row("num_layers", "num_hidden_layers"),
    Row("hidden_size", "hidden_size"),
    Row("ffn_hidden_size", "intermediate_size"),
    Row("moe_ffn_hidden_size", "intermediate_size"),
    Row("seq_length", "max_position_embeddings", transformer=None, flag=False),
    Row("max_position_embeddings", "max_position_embeddings", transformer=None),
    Row("num_attention_heads", "num_attention_heads"),
    Row("group_query_attention", value=True, transformer=None, read=False),  # False: as many groups as heads
    Row("num_query_groups", "num_key_value_heads"),
    Row("kv_channels", "head_dim"),
    Row("position_embedding_type", value="rope", transformer=None),
    Row("add_position_embedding", value=True, transformer=None, flag=False, read=False),  # of older engines
    Row("use_rotary_position_embeddings", value=True, transformer=None, flag=False, read=False),
    Row("rotary_base", "rope_theta", transformer=None, write=lambda base: int(base) if base == int(base) else base),
    Row("rotary_percent", value=1.0, transformer=None),
    Row("rotary_interleaved", value=False),
    Row("add_bias_linear", value=False),
    Row("add_qkv_bias", value=False),
    Row("squared_relu", value=False, transformer=None),
    Row("swiglu", value=True, transformer="gated_linear_unit"),
    Row("untie_embeddings_and_output_weights", "tie_word_embeddings", transformer=None,
        write=lambda tied: not tied, back=lambda untied: not untied),
    Row("normalization", value="RMSNorm"),
    Row("norm_epsilon", "rms_norm_eps", transformer=None, flag=False),
    Row("layernorm_epsilon", "rms_norm_eps"),
    Row("apply_layernorm_1p", value=False, transformer="layernorm_zero_centered_gamma", flag=False),
    Row("apply_query_key_layer_scaling", value=False, transformer=None, flag=False, read=False),
    Row("attention_dropout", value=0.0, read=False),  # in training only: the network is the same
    Row("hidden_dropout", value=0.0, read=False),
    Row("num_experts", "num_local_experts", transformer="num_moe_experts"),
    Row("moe_layer_freq", value=1),
    Row("moe_router_topk", "num_experts_per_tok"),
    # Softmax over the chosen experts only, which is softmax over all, then top-k, then renormalised (as in HF).
    # With one expert (a dense model) that would be top-1, for which the engine wants the softmax first: 1 either way.
    Row("moe_router_pre_softmax", "num_local_experts", write=lambda experts: experts == 1),
    Row("moe_router_score_function", value="softmax"),
    Row("moe_router_enable_expert_bias", value=False),
    Row("vocab_size", "vocab_size", transformer=None),
    Row("window_size", "sliding_window", write=window_size, back=sliding_window),
)

# Switches of other models, with the values under which they do nothing. Some are computed, some the attention and the
# experts of this library would leave out in silence; none can be said in a Hugging Face Mixtral's config.json.
FOREIGN: Mapping[str, tuple[Any, ...]] = {
    "moe_router_topk_scaling_factor": (None, 1.0), "moe_router_num_groups": (None,), "moe_router_group_topk": (None,),
    "moe_apply_probs_on_input": (False,), "moe_latent_size": (None,), "moe_shared_expert_intermediate_size": (None,),
    "moe_mlp_glu_interleave_size": (None,), "mtp_num_layers": (None, 0), "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,), "attention_output_gate": (False,), "linear_attention_freq": (None,),
    "softmax_type": ("vanilla",), "qk_layernorm": (False,), "qk_l2_norm": (False,), "no_rope_freq": (None,),
    "use_rope_scaling": (False,), "rotary_seq_len_interpolation_factor": (None, 1), "window_attn_skip_freq": (None,),
    "quick_geglu": (False,), "openai_gelu": (False,), "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0,), "layernorm_zero_centered_gamma": (False,), "use_mup": (False,),
    "apply_residual_connection_post_layernorm": (False,), "is_hybrid_model": (False,), "hybrid_layer_pattern": (None,),
    "heterogeneous_layers_config_path": (None,),
}

_FLAG_OF = {"layernorm_epsilon": "--norm-epsilon", "add_bias_linear": "--disable-bias-linear",
            "layernorm_zero_centered_gamma": "--apply-layernorm-1p"}
# Where a field is under several names, the one to believe first: a stock run may set `ffn_hidden_size` for dense layers
# that a Mixtral does not have.
_READ_FROM = {"intermediate_size": ("moe_ffn_hidden_size", "ffn_hidden_size"),
              "max_position_embeddings": ("max_position_embeddings", "seq_length"),
              "rms_norm_eps": ("norm_epsilon", "layernorm_epsilon"),
              "num_local_experts": ("num_experts", "num_moe_experts"),
              "vocab_size": ("vocab_size", "padded_vocab_size")}


# -- from a Mixtral to the engine --------------------------------------------------------------------------


def saved_args(config: MixtralConfig) -> dict[str, Any]:
    """Every argument of the table: what a checkpoint of this model says about it."""
    return {row.argument: row.value if row.field is None else row.write(getattr(config, row.field)) for row in TABLE}


def architecture_args(config: MixtralConfig) -> dict[str, Any]:
    """The arguments that the architecture fixes in a run: defaults of the engine's parser."""
    _check_routing(config)
    values = saved_args(config)
    return {row.argument: values[row.argument] for row in TABLE if row.flag}


def transformer_fields(config: MixtralConfig) -> dict[str, Any]:
    """The fields of `TransformerConfig` that the architecture fixes, but for the activation function (SiLU)."""
    _check_routing(config)
    values = saved_args(config)
    return {row.transformer or row.argument: values[row.argument] for row in TABLE if row.transformer is not None}


def _check_routing(config: MixtralConfig) -> None:
    if config.num_experts_per_tok == 1 < config.num_local_experts:
        raise ConfigError(f"num_experts_per_tok 1 of {config.num_local_experts} experts: a Mixtral divides the "
                          "weights of the chosen experts by their sum, which leaves 1 and nothing to learn for its "
                          "routers, and the engine has no such router; choose 2 or more (config.json)")


def differs(name: str, found: Any, expected: Any) -> bool:
    """Whether the engine's argument or field `name` is not the Mixtral's. A window is a list after parsing."""
    return (tuple(found) if name == "window_size" and found is not None else found) != expected


def check_flags(args: Namespace, config: MixtralConfig) -> None:
    """`ConfigError` where a run's arguments make another model than `config`."""
    for name, harmless in FOREIGN.items():
        found = getattr(args, name, None)
        if found not in (None, False, *harmless):
            flag = _FLAG_OF.get(name, "--" + name.replace("_", "-"))
            raise ConfigError(f"{flag} ({found}) makes another model than a Mixtral: drop the flag")
    for name, expected in architecture_args(config).items():
        if differs(name, getattr(args, name), expected):
            raise contradiction(name, getattr(args, name), expected)


def contradiction(name: str, found: Any, expected: Any) -> ConfigError:
    """The error for a run's argument `name` that is `found` where the model has `expected`."""
    return ConfigError(f"{_FLAG_OF.get(name, '--' + name.replace('_', '-'))} {found} contradicts the model's {name} "
                       f"{expected}: drop the flag; the architecture comes from the checkpoint or from --model")


# -- from saved arguments to a Mixtral -----------------------------------------------------------------------


def config_of_checkpoint(root: Path, args: Namespace | None, where: str) -> MixtralConfig:
    """The architecture of a Megatron checkpoint: `mixtral_config.json` of `root`, else what its arguments say.

    `args` are the arguments that it carries (None: it has none), `where` is the file that has them. `CheckpointError`
    for another architecture than a Mixtral's, and where the two contradict each other.
    """
    path = root / CONFIG_FILE
    if not path.exists():
        if args is None:
            raise CheckpointError(f"{where}: holds no args; put a {CONFIG_FILE} into {root} that says what the model "
                                  "is")
        return config_from_args(args, where)
    config = MixtralConfig.from_checkpoint(root)
    if args is not None:
        check_saved(args, config, where, str(path))
    return config


def config_from_args(args: Namespace, where: str) -> MixtralConfig:
    """The architecture, for checkpoints without a `mixtral_config.json` (written by the engine's own programs).

    `vocab_size` is the padded one where the arguments do not have the true one; padded rows are then exported too.
    """
    _refuse_foreign(args, where)
    said = {field: value for field, (_, _, value) in _said(args).items()}
    optional = {"head_dim", "sliding_window", "tie_word_embeddings"}
    missing = [row.field for row in TABLE if row.field is not None and row.field not in {*said, *optional}]
    if missing:
        raise CheckpointError(f"{where}: args does not say {', '.join(dict.fromkeys(missing))}; put a {CONFIG_FILE} "
                              "beside the checkpoint")
    try:
        return MixtralConfig(**said)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None


def check_saved(args: Namespace, config: MixtralConfig, where: str, identity: str) -> None:
    """`CheckpointError` where saved arguments are not of `config`, which `identity` names. What is absent is not said.

    Two sizes are left to the tensors' shapes and to the run: the engine stores the vocabulary sometimes padded,
    sometimes not at all, and positions as long as the run's sequences.
    """
    _refuse_foreign(args, where)
    for field, (name, found, value) in _said(args).items():
        expected = getattr(config, field)
        if field not in ("vocab_size", "max_position_embeddings") and value != expected:
            raise CheckpointError(f"{where}: its args say {name} {found}, {identity} says {field} {expected}: one of "
                                  "them is of another model")


def _refuse_foreign(args: Namespace, where: str) -> None:
    fixed = {row.argument: (row.value,) for row in TABLE if row.field is None and row.read}
    fixed["moe_router_pre_softmax"] = (False, getattr(args, "num_experts", None) == 1)
    for name, harmless in (fixed | dict(FOREIGN)).items():
        found = getattr(args, name, None)
        each = found if name == "moe_layer_freq" and isinstance(found, list) else [found]  # one number for each layer
        # An unset switch is None, or False where another engine stores a plain switch.
        if any(one is not None and one not in harmless and not (one is False and None in harmless) for one in each):
            raise CheckpointError(f"{where}: not a Mixtral: {name} is {found!r}, expected {harmless[0]!r}")


def _said(args: Namespace) -> dict[str, tuple[str, Any, Any]]:
    """What arguments say of a `MixtralConfig`: field -> (argument, its value, the field's value)."""
    found: dict[str, tuple[str, Any, Any]] = {}
    for row in TABLE:
        if row.field is None or row.field in found:
            continue
        names = _READ_FROM.get(row.field, (row.argument,))
        if row.argument == "num_query_groups" and not getattr(args, "group_query_attention", True):
            names = ("num_attention_heads",)
        name = next((name for name in names if getattr(args, name, None) is not None), None)
        if name is not None:
            found[row.field] = (name, getattr(args, name), row.back(getattr(args, name)))
    if hasattr(args, "window_size") and args.window_size is None:  # says that there is none
        found["sliding_window"] = ("window_size", None, None)
    return found


# -- the layout ----------------------------------------------------------------------------------------------

LAYOUT_ARGS: Mapping[str, str] = {
    "tensor_model_parallel_size": "tp", "pipeline_model_parallel_size": "pp",
    "virtual_pipeline_model_parallel_size": "vpp", "expert_model_parallel_size": "ep",
    "expert_tensor_parallel_size": "etp", "decoder_first_pipeline_num_layers": "first",
    "decoder_last_pipeline_num_layers": "last",
}
# Ways of laying out stages that this library does not model.
_UNSUPPORTED = ("pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split",
                "account_for_loss_in_pipeline_split")


def layout_args(layout: ParallelLayout) -> dict[str, int | None]:
    """The engine's arguments of a layout that decide about weights."""
    return {name: getattr(layout, axis) if (name, layout.vpp) != ("virtual_pipeline_model_parallel_size", 1) else None
            for name, axis in LAYOUT_ARGS.items()}


def layout_from_args(args: Namespace, where: str) -> ParallelLayout:
    """The layout that wrote a checkpoint. Raises `CheckpointError` for one this library does not model."""
    for name in _UNSUPPORTED:
        if getattr(args, name, None) not in (None, False):
            raise CheckpointError(f"{where}: was saved with {name} = {getattr(args, name)!r}, which is not supported")
    sizes = {axis: getattr(args, name) for name, axis in LAYOUT_ARGS.items() if getattr(args, name, None) is not None}
    if "tp" not in sizes or "pp" not in sizes:
        raise CheckpointError(f"{where}: args has no tensor_model_parallel_size or pipeline_model_parallel_size")
    sizes.setdefault("vpp", getattr(args, "num_virtual_stages_per_pipeline_rank", None) or 1)
    try:
        return ParallelLayout(**sizes)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
