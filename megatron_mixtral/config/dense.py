"""Dense relatives: a Mistral, Llama or InternLM2 is a Mixtral of one expert, whose router has nothing to choose.

The softmax over one expert is 1, so the layer computes what the dense MLP does, and the router's gradient is 0. Here is
what a dense config.json means as a Mixtral's; the names of its tensors are in `weights/rules.py`.
"""

import json
from functools import lru_cache
from typing import Any

from megatron_mixtral.errors import ConfigError

# What each model assumes for keys that a config.json lacks, where it is not what transformers assumes for a Mixtral.
# Sources: transformers' MistralConfig and LlamaConfig; configuration_internlm2.py beside InternLM2's weights.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"rms_norm_eps": 1e-6, "sliding_window": 4096},
    "llama": {"rms_norm_eps": 1e-6, "intermediate_size": 11008, "num_key_value_heads": None,
              "max_position_embeddings": 2048},
    "internlm2": {"rms_norm_eps": 1e-6, "intermediate_size": 11008, "num_key_value_heads": None,
                  "max_position_embeddings": 2048, "vocab_size": 103168, "bias": True},
}
ROPE_THETA = 10000.0
UNHEEDED = {"llama": ("sliding_window",), "internlm2": ("sliding_window", "head_dim")}  # and a Mixtral heeds them


def as_mixtral(hf: dict[str, Any], where: str) -> dict[str, Any]:
    """The contents of a dense model's config.json as those of the Mixtral of one expert that computes the same.

    Raises `ConfigError` for positions that are scaled within the trained length, and for InternLM2's biases.
    """
    kind = hf["model_type"]
    values = DEFAULTS[kind] | {key: value for key, value in hf.items() if key not in UNHEEDED.get(kind, ())}
    if values.pop("bias", False):
        said = "" if "bias" in hf else ", which is what an absent key means"
        raise ConfigError(f"{where}: bias is true{said}: a Mixtral's linears have none; expected an InternLM2 with "
                          "\"bias\": false, as the published ones are")
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(values.get(key), dict):
            values[key] = _unscaled(values[key], key, where)
    if values.get("rope_theta") is None and (values.get("rope_parameters") or {}).get("rope_theta") is None:
        values["rope_theta"] = ROPE_THETA
    return values | {"model_type": "mixtral", "num_local_experts": 1, "num_experts_per_tok": 1,
                     "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.0}


def _unscaled(scaling: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """RoPE's settings without a scaling that does nothing up to max_position_embeddings, which no run exceeds.

    "dynamic" is such a one (NTK-aware, in transformers and in InternLM2): it acts on longer sequences only.
    """
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "dynamic" and scaling.get("original_max_position_embeddings") is None:
        kept = {name: value for name, value in scaling.items() if name == "rope_theta"}
        return kept | {"rope_type": "default"}
    if scaling.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(f"{where}: {key}: partial_rotary_factor = {scaling['partial_rotary_factor']} is not computed "
                          "here; expected 1")
    if kind != "default":
        raise ConfigError(f"{where}: {key}: rope_type = {kind!r} changes the positions of tokens within the trained "
                          "length, which is not computed here; expected none, or 'dynamic' without an original length "
                          "(it acts beyond max_position_embeddings only, and no sequence here is longer)")
    return scaling


@lru_cache(maxsize=16)
def model_type(dense_config: str) -> str:
    """The dense model's type, from the text of its config.json. Raises `ConfigError` for a text that is none."""
    try:
        kind = json.loads(dense_config)["model_type"]
    except (ValueError, TypeError, KeyError):
        kind = None
    if kind not in DEFAULTS:
        raise ConfigError(f"dense_config must be the config.json of one of {', '.join(DEFAULTS)}, found model_type "
                          f"{kind!r}")
    return kind
