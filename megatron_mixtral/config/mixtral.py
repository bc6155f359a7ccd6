"""`MixtralConfig`: what the network is. Field names are Hugging Face's, so that one name serves everywhere.

It holds the architecture only: no dtype, no parallelism, no path. Everything else (engine configuration,
weight plan, FLOP count) is derived from it. Standard library only.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mixtral.config import dense
from megatron_mixtral.disk import START, placeholder
from megatron_mixtral.errors import ConfigError

CONFIG_FILE = "mixtral_config.json"  # in every Megatron checkpoint: weights carry their identity

# Keys of a config.json that would change the computation in a way this library does not implement,
# with the values under which they do nothing.
_INERT_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None, {}, {"rope_type": "default"}, {"type": "default"},
                     {"rope_type": "default", "type": "default"}),
    "quantization_config": (None,),
    "attention_dropout": (0, 0.0, None),
    "partial_rotary_factor": (1, 1.0, None),
}


@dataclass(frozen=True, kw_only=True)
class MixtralConfig:
    """A Mixtral architecture. Sizes are counts of elements; defaults are those of Mixtral-8x7B-v0.1."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336  # of one expert
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8  # query groups
    head_dim: int | None = None  # None: hidden_size / num_attention_heads, resolved at construction
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    router_aux_loss_coef: float = 0.02
    router_jitter_noise: float = 0.0
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    dense_config: str | None = None  # of a dense model, a Mixtral of one expert: its config.json, word for word

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "num_local_experts", "num_experts_per_tok", "max_position_embeddings"):
            _check(name, getattr(self, name), _is_positive_integer, "a positive integer")
        for name in ("rope_theta", "rms_norm_eps"):
            _check(name, getattr(self, name), _is_positive, "a positive number")
        for name in ("router_aux_loss_coef", "router_jitter_noise", "initializer_range"):
            _check(name, getattr(self, name), lambda value: value == 0 or _is_positive(value),
                   "a number of at least 0")
        _check("sliding_window", self.sliding_window, lambda value: value is None or _is_positive_integer(value),
               "a positive integer or null")
        _check("tie_word_embeddings", self.tie_word_embeddings, lambda value: isinstance(value, bool), "true or false")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"head_dim is not given and hidden_size {self.hidden_size} is not a multiple of "
                    f"num_attention_heads {self.num_attention_heads}: set head_dim in config.json")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if not isinstance(self.head_dim, int) or self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(f"head_dim must be an even positive integer (rotary pairs), found {self.head_dim!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}: query heads share key/value heads in equal groups")
        if self.num_experts_per_tok > self.num_local_experts:
            raise ConfigError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_local_experts {self.num_local_experts}")
        if self.model_type != "mixtral" and self.num_local_experts != 1:
            raise ConfigError(f"num_local_experts is {self.num_local_experts}, and dense_config says that this is a "
                              f"{self.model_type}, a Mixtral of one expert")

    @property
    def model_type(self) -> str:
        """What the model is: "mixtral", or "mistral", "llama", "internlm2" for a dense one."""
        return "mixtral" if self.dense_config is None else dense.model_type(self.dense_config)

    # -- Hugging Face ------------------------------------------------------------------------------------

    @classmethod
    def from_hf_dict(cls, hf: dict[str, Any], where: str = "config.json", text: str | None = None) -> "MixtralConfig":
        """From the contents of a Hugging Face `config.json`, as transformers 4 or 5 writes it: a Mixtral's, or a dense
        relative's (`config/dense.py`), of which `text` is kept (default: `hf` as JSON).

        transformers 4 has `rope_theta` at the top level, transformers 5 has `rope_parameters.rope_theta`.
        A key that is absent has the value that `transformers.MixtralConfig` gives it. Raises `ConfigError` for
        another model type and for keys that would change the computation (RoPE scaling, biases, quantization).
        """
        model_type = hf.get("model_type")
        if model_type not in ("mixtral", *dense.DEFAULTS):
            raise ConfigError(f"{where}: expected model_type 'mixtral', or that of a dense relative "
                              f"({', '.join(dense.DEFAULTS)}), found {model_type!r}")
        original = None
        if model_type != "mixtral":
            original = json.dumps(hf, indent=2) + "\n" if text is None else text
            hf = dense.as_mixtral(hf, where)
        for key, inert in _INERT_VALUES.items():
            if key in hf and hf[key] not in inert:
                raise ConfigError(f"{where}: {key} = {hf[key]!r} is not supported (expected {inert[0]!r}); "
                                  "a Mixtral trained with it would be computed wrongly")
        values = {f.name: hf[f.name] for f in dataclasses.fields(cls) if f.name in hf} | {"dense_config": original}
        values["rope_theta"] = _rope_theta(hf, where)
        # Absent keys: the defaults of transformers.MixtralConfig where they differ from Mixtral-8x7B-v0.1's.
        values.setdefault("max_position_embeddings", 131072)
        values.setdefault("router_aux_loss_coef", 0.001)
        if values.get("num_key_value_heads", 8) is None:
            values["num_key_value_heads"] = values.get("num_attention_heads", 32)
        eos = values.get("eos_token_id")
        if isinstance(eos, list):
            values["eos_token_id"] = eos[0] if eos else None
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    @classmethod
    def from_hf_dir(cls, directory: str | Path) -> "MixtralConfig":
        """From `directory/config.json`."""
        path = Path(directory) / "config.json"
        return cls.from_hf_dict(read_json(path), where=str(path), text=path.read_bytes().decode("utf-8"))

    def to_hf_dict(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """Contents of a `config.json` that both transformers 4 and 5 read: each key in both spellings.

        `dtype` is the torch dtype's name of the weights beside it ("bfloat16", "float32", ...). Of a dense model they
        are the original ones, but for a type that they name.
        """
        if self.dense_config is not None:
            contents = json.loads(self.dense_config)
            return contents | dict.fromkeys((key for key in ("dtype", "torch_dtype") if key in contents), dtype)
        hf = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "dense_config"}
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            **hf,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "output_router_logits": False,
            "use_cache": True,
            "dtype": dtype,
            "torch_dtype": dtype,
        }

    # -- Megatron checkpoints ------------------------------------------------------------------------------

    @classmethod
    def from_checkpoint(cls, directory: str | Path) -> "MixtralConfig":
        """From `directory/mixtral_config.json`, which every Megatron checkpoint of this library has."""
        path = Path(directory) / CONFIG_FILE
        values = read_json(path)
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f"{path}: unknown keys {unknown}; was it written by a newer megatron_mixtral?")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_json(self) -> str:
        """Contents of `mixtral_config.json`; only a dense model's has a `dense_config`."""
        values = dataclasses.asdict(self)
        if self.dense_config is None:
            del values["dense_config"]
        return json.dumps(values, indent=2) + "\n"

    # -- Counts ------------------------------------------------------------------------------------------

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert: w1, w2, w3."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's q, k, v and o projections."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads  # q, o, k, v
        return self.hidden_size * heads * self.head_dim

    @property
    def _routed(self) -> int:
        """Rows of a router that count: a dense model has none."""
        return self.num_local_experts if self.dense_config is None else 0

    def _parameters(self, experts: int) -> int:
        """With so many experts a layer. Beside them: attention, router, two norms; embeddings and the last norm."""
        layer = self.attention_parameters + self.hidden_size * (self._routed + 2)
        matrices = 1 if self.tie_word_embeddings else 2
        return (self.num_hidden_layers * (layer + experts * self.expert_parameters)
                + matrices * self.vocab_size * self.hidden_size + self.hidden_size)

    @property
    def total_parameters(self) -> int:
        """All parameters (8x7B: 46,702,792,704)."""
        return self._parameters(self.num_local_experts)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: `num_experts_per_tok` experts a layer (8x7B: 12,879,925,248)."""
        return self._parameters(self.num_experts_per_tok)

    def training_flops_per_token(self, seq_length: int) -> int:
        """Model FLOPs of one token's forward and backward pass at a sequence length, in floating point operations.

        Matrix products only, 2 FLOPs a multiply-add, backward twice the forward (the PaLM report's appendix B
        convention): the active experts, the attention projections, the router, the output layer, and causal
        attention at its average number of keys (QK^T and AV): half the sequence, or, in a sliding window w shorter
        than the sequence s, w - w^2 / 2s. Recomputation is not counted.
        """
        matrices = self.attention_parameters + self.hidden_size * self._routed
        matrices += self.num_experts_per_tok * self.expert_parameters
        window = min(self.sliding_window or seq_length, seq_length)
        keys = window - window**2 / (2 * seq_length)
        scores = 2 * self.num_attention_heads * self.head_dim * keys
        forward = 2 * (self.num_hidden_layers * (matrices + scores) + self.vocab_size * self.hidden_size)
        return round(3 * forward)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or a `ConfigError` that names the file."""
    try:
        contents = path.read_bytes()
        cure = placeholder(contents[:START])
        if cure is not None:
            raise ConfigError(f"{path} {cure}")
        value = json.loads(contents.decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _rope_theta(hf: dict[str, Any], where: str) -> float:
    """The RoPE base in either spelling. A wrong base loads without complaint and ruins the model, so it is checked."""
    parameters = hf.get("rope_parameters") or {}
    _check(f"{where}: rope_parameters", parameters, lambda value: isinstance(value, dict), "an object or null")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{where}: rope_parameters.rope_type = {kind!r} is not supported (expected 'default')")
    found = {key: source["rope_theta"] for key, source in (("rope_theta", hf), ("rope_parameters", parameters))
             if source.get("rope_theta") is not None}
    for base in found.values():
        _check(f"{where}: rope_theta", base, _is_positive, "a positive number")
    if len(set(found.values())) > 1:
        raise ConfigError(f"{where}: two different RoPE bases: {found}; remove the wrong one")
    return float(next(iter(found.values()), 1e6))


def _check(name: str, value: Any, fits: Callable[[Any], bool], expected: str) -> None:
    if not fits(value):
        raise ConfigError(f"{name} must be {expected}, found {value!r}")


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: Any) -> bool:
    """Whether a value is a number above 0 that a float can hold: not NaN, not infinite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


PRESETS: dict[str, MixtralConfig] = {
    # Sized for a laptop: 14 M parameters with the real vocabulary; 4 layers and 4 query groups allow tp4, pp4, ep8.
    "tiny": MixtralConfig(hidden_size=128, intermediate_size=448, num_hidden_layers=4, num_attention_heads=8,
                          num_key_value_heads=4, max_position_embeddings=4096),
    "mixtral-4x7b": MixtralConfig(num_local_experts=4),
    "mixtral-8x7b": MixtralConfig(),
    "mixtral-8x22b": MixtralConfig(hidden_size=6144, intermediate_size=16384, num_hidden_layers=56,
                                   num_attention_heads=48, max_position_embeddings=65536,
                                   router_aux_loss_coef=0.001),
}


def preset(name: str) -> MixtralConfig:
    """A named architecture: tiny, mixtral-4x7b, mixtral-8x7b, mixtral-8x22b (the `mixtral-` may be left out)."""
    for key in (name.lower(), f"mixtral-{name.lower()}"):
        if key in PRESETS:
            return PRESETS[key]
    raise ConfigError(f"--model {name}: no such preset; expected one of {', '.join(PRESETS)}")
