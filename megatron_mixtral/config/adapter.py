"""`AdapterConfig`: the low-rank adapters (LoRA) of a Mixtral: the base's configuration, and what stands beside it.

A linear y = W x with adapters computes y = W x + alpha / rank * B A x, W frozen, A [rank, in] and B [out, rank] trained
("LoRA", arXiv:2106.09685). Targets have the names of Hugging Face's linears, as in PEFT's `target_modules`.
"""

from argparse import Namespace
from dataclasses import dataclass, fields
from typing import Any

from megatron_mixtral.config.layout import ParallelLayout
from megatron_mixtral.config.mixtral import MixtralConfig
from megatron_mixtral.errors import ConfigError

ATTENTION, EXPERTS, ROUTER = ("q_proj", "k_proj", "v_proj", "o_proj"), ("w1", "w2", "w3"), ("gate",)
TARGETS = (*ATTENTION, *EXPERTS)  # unless others are asked for
BLOCK = 64  # packed numbers that share a largest magnitude
# Field -> the argument of a run, which its checkpoints carry.
_SAVED = {"rank": "lora_rank", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "lora_target_modules",
          "quantized": "qlora", "base": "lora_base", "base_name": "hf_checkpoint"}


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(MixtralConfig):
    """Adapters of a Mixtral. `base` identifies its weights (`weights.adapters.fingerprint`), `base_name` says where
    they were read; `quantized`, that they were rounded to 4 bits (NF4) in training. Raises `ConfigError` for adapters
    that cannot be.
    """

    rank: int
    alpha: float = 16.0
    dropout: float = 0.0  # of what A is given, in training only
    targets: tuple[str, ...] = TARGETS
    quantized: bool = False
    base: str | None = None
    base_name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or self.alpha <= 0:
            raise ConfigError(f"--lora-rank {self.rank} and --lora-alpha {self.alpha} must be positive")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--lora-dropout {self.dropout}: expected a share of at least 0 and below 1")
        known = (*TARGETS, *ROUTER)
        wrong = [name for name in self.targets if name not in known]
        if wrong or not self.targets or len(set(self.targets)) != len(self.targets):
            raise ConfigError(f"--lora-target-modules {','.join(self.targets)}: expected some of {', '.join(known)}, "
                              f"each once{f'; found {wrong[0]!r}' if wrong else ''}")
        if self.dense_config is not None and set(ROUTER) & set(self.targets):
            raise ConfigError(f"--lora-target-modules {','.join(ROUTER)}: the base is a {self.model_type} and has "
                              "no router; leave it out")
        if ("w1" in self.targets) != ("w3" in self.targets):
            where = "transformers 5, where PEFT loads" if self.dense_config is None else "the engine, which has"
            raise ConfigError(f"--lora-target-modules: w1 and w3 (gate and up) are one matrix in {where} adapters of "
                              "both or of neither; name both, or none")
        object.__setattr__(self, "targets", tuple(name for name in known if name in self.targets))

    @classmethod
    def of(cls, config: MixtralConfig, **values: Any) -> "AdapterConfig":
        """Adapters of the Mixtral `config`."""
        return cls(**{item.name: getattr(config, item.name) for item in fields(MixtralConfig)}, **values)

    @classmethod
    def from_args(cls, config: MixtralConfig, args: Namespace | None) -> MixtralConfig:
        """What a checkpoint with the arguments `args` holds: adapters of `config`, or (no --lora-rank) the model."""
        if getattr(args, "lora_rank", None) is None:
            return config
        values = {name: getattr(args, saved, getattr(cls, name, None)) for name, saved in _SAVED.items()}
        targets = tuple(name.strip() for name in values["targets"].split(",") if name.strip())
        return cls.of(config, **values | {"targets": targets})

    def to_args(self) -> dict[str, Any]:
        """The arguments by which `from_args` knows them again."""
        return {saved: getattr(self, name) for name, saved in _SAVED.items()} | {
            "lora_target_modules": ",".join(self.targets)}

    def to_json(self) -> str:
        """Contents of `mixtral_config.json`: of the model, to which the adapters belong."""
        return self.model.to_json()

    @property
    def model(self) -> MixtralConfig:
        """The Mixtral that the adapters belong to."""
        return MixtralConfig(**{item.name: getattr(self, item.name) for item in fields(MixtralConfig)})

    def check_blocks(self, layout: ParallelLayout) -> None:
        """`ConfigError` where a base in 4 bits would be cut inside of a block."""
        queries = self.num_attention_heads * self.head_dim
        for what, size, ways in (("hidden_size", self.hidden_size, 1), ("all query heads", queries, layout.tp),
                                 ("intermediate_size", self.intermediate_size, layout.etp)):
            if self.quantized and size % (ways * BLOCK):
                raise ConfigError(f"--qlora packs blocks of {BLOCK} numbers along the rows of a matrix: {what} "
                                  f"{size} / {ways} = {size / ways:g} is no multiple of {BLOCK}; lower the "
                                  "(expert) tensor parallel size, or drop --qlora")

    @staticmethod
    def packs(name: str) -> bool:
        """Whether a base of 4 bits has the weight of this Hugging Face name packed: every linear, a target or not."""
        return name.split(".")[-2] in TARGETS

    @staticmethod
    def packed_bytes(size: int) -> float:
        """Bytes of a packed number of a model whose type takes `size`: each block shares a magnitude of that type."""
        return 0.5 + size / BLOCK

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    @property
    def trained_parameters(self) -> int:
        """Numbers in all A and B."""
        h, f, queries = self.hidden_size, self.intermediate_size, self.num_attention_heads * self.head_dim
        keys, experts = self.num_key_value_heads * self.head_dim, self.num_local_experts
        sides = {"q_proj": h + queries, "k_proj": h + keys, "v_proj": h + keys, "o_proj": queries + h,
                 **dict.fromkeys(EXPERTS, experts * (h + f)), "gate": h + experts}
        return self.rank * self.num_hidden_layers * sum(sides[name] for name in self.targets)

