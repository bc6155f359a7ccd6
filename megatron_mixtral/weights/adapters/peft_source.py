"""Reading adapters in PEFT's form: what its `save_pretrained` writes, XTuner's .bin among it.

Two forms of the experts' adapters. By expert, `block_sparse_moe.experts.E.w1.lora_A.weight`, as this library writes
them, vLLM reads them and PEFT wrote them on transformers 4. And fused, as PEFT writes them on transformers 5, where a
layer's experts are two parameters:

    mlp.experts.base_layer.lora_A  [E * 2r, hidden], experts slowest    ...lora_B  [2 * ffn, 2r * E], experts fastest
    mlp.experts.lora_A             [E * r, ffn]                         ...lora_B  [hidden, r * E]

Where one of the two parameters is a target, it has the second name, whichever it is (`target_parameters` says it).
w1 and w3 share there a matrix of rank 2r, of which their own parts are the diagonal blocks. `peft_sink` writes both.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from megatron_mixtral.config import CONFIG_FILE, AdapterConfig, MixtralConfig, read_json
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.weights.dtypes import FLOATS
from megatron_mixtral.weights.files import MappedFiles, Stored, load_torch, safetensors
from megatron_mixtral.weights.protocols import Fragment, TensorSource
from megatron_mixtral.weights.rules import (
    PACKED_QKV,
    PEFT_PREFIX,
    QKV,
    HFTensor,
    dense_name,
    dense_target,
    hf_tensors,
)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
IDENTITY_FILE = "mixtral_adapter.json"  # ours: which base, and whether it was rounded
FUSED, FUSED_INNER = "mlp.experts", "mlp.experts.base_layer"
# Keys of adapter_config.json that would change the computation, with the values under which they do nothing.
_INERT: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None), "use_dora": (False, None), "use_rslora": (False, None), "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []), "lora_bias": (False, None), "layers_to_transform": (None, []),
    "trainable_token_indices": (None, []), "alora_invocation_tokens": (None, []),
}


def fused_name(config: AdapterConfig, tensor: HFTensor) -> str:
    """The name of the tensor over all experts that a matrix belongs to."""
    *_, linear, letter, _ = tensor.name.split(".")
    inner = linear != "w2" and "w2" in config.targets
    return f"{PEFT_PREFIX}model.layers.{tensor.layer}.{FUSED_INNER if inner else FUSED}.{letter}.weight"


def names_in(config: AdapterConfig, tensor: HFTensor) -> tuple[str, ...]:
    """The names that a matrix may have in the file, the first as it is written: a dense model has its own.

    Raises `ConfigError` where the model has q, k and v in one matrix, whose adapters PEFT would share.
    """
    kind = config.model_type
    if config.dense_config is None:
        return tensor.names()
    if kind in PACKED_QKV and tensor.rule.name.startswith(QKV.name):
        raise ConfigError(f"adapters of q_proj, k_proj or v_proj: a {kind} has the three in one matrix, of which PEFT "
                          "trains one adapter, and so they have no form there; merge them into their base with "
                          "merge-lora, or train other targets (--lora-target-modules o_proj,w1,w2,w3)")
    return (dense_name(tensor.name, kind),)


def target_in(config: MixtralConfig, linear: str) -> str:
    """The name that a linear has among PEFT's `target_modules`."""
    return linear if config.dense_config is None else dense_target(linear, config.model_type)


class PeftSource(TensorSource):
    """A folder of PEFT's. The base's architecture is in it if this library wrote it; else `base` says it, or the local
    folder that the adapter names. Raises `ConfigError` for adapters of another kind, `CheckpointError` for its files.
    """

    signs = (ADAPTER_CONFIG,)

    def __init__(self, directory: str | Path, base: MixtralConfig | None = None) -> None:
        self.where, self.mapped = Path(directory), MappedFiles()
        self.left_behind, self.companions = [], []
        found = next((self.where / name for name in ADAPTER_FILES if (self.where / name).is_file()), None)
        if found is None:
            raise CheckpointError(f"{self.where}: has {ADAPTER_CONFIG} and no {' or '.join(ADAPTER_FILES)}")
        self.file, mapped = found, self.mapped[found]
        tensors = load_torch(mapped, str(found)) if found.suffix == ".bin" else safetensors.load_safetensors(mapped)
        self._tensors = {str(name): one for name, one in tensors.items()}
        self.config = self._adapter(base)
        self._used: set[str] = set()

    # -- What is there -----------------------------------------------------------------------------------

    def _adapter(self, base: MixtralConfig | None) -> AdapterConfig:
        path = self.where / ADAPTER_CONFIG
        said = read_json(path)
        if said.get("peft_type") != "LORA":
            raise ConfigError(f"{path}: peft_type is {said.get('peft_type')!r}, expected 'LORA'")
        for name, inert in _INERT.items():
            if name in said and said[name] not in inert:
                raise ConfigError(f"{path}: {name} is {said[name]!r}, which is not computed here (only {inert[0]!r})")
        rank, alpha = said.get("r"), said.get("lora_alpha")
        if not isinstance(rank, int) or not isinstance(alpha, int | float):
            raise ConfigError(f"{path}: r is {rank!r} and lora_alpha {alpha!r}, expected numbers")
        for name, kind, plain in (("rank_pattern", "r", rank), ("alpha_pattern", "lora_alpha", alpha)):
            for pattern, value in (said.get(name) or {}).items():
                if value != plain and not (pattern.endswith("gate_up_proj") and value == 2 * plain):
                    raise ConfigError(f"{path}: {name} gives {pattern} {value}, the others have {kind} {plain}: "
                                      "adapters of one rank and alpha are read here")
        named = said.get("base_model_name_or_path")
        identity = read_json(self.where / IDENTITY_FILE) if (self.where / IDENTITY_FILE).is_file() else {}
        model = base or self._base(named)
        ours = {target_in(model, name): name for name in AdapterConfig.targets}
        targets = self._targets(said.get("target_parameters") or ())
        try:
            return AdapterConfig.of(
                model, rank=rank, alpha=float(alpha), base_name=named,
                targets=tuple(ours.get(name, name) for name in targets), base=identity.get("base"),
                quantized=bool(identity.get("quantized")))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def _base(self, named: Any) -> MixtralConfig:
        if (self.where / CONFIG_FILE).is_file():
            return MixtralConfig.from_checkpoint(self.where)
        if isinstance(named, str) and (Path(named) / "config.json").is_file():
            return MixtralConfig.from_hf_dir(named)
        raise ConfigError(f"{self.where} does not say which Mixtral its adapters are of (base_model_name_or_path is "
                          f"{named!r}, which is no local folder): give the base, --base-dir DIR")

    def _targets(self, fused: Sequence[str]) -> tuple[str, ...]:
        linears = {name.rpartition(".lora_")[0].removeprefix(PEFT_PREFIX) for name in self._tensors}
        found = {name.rpartition(".")[2] for name in linears if not name.endswith((FUSED, FUSED_INNER))}
        for parameter in fused if any(name.endswith(FUSED) for name in linears) else ():
            found |= {"w2"} if parameter.endswith("down_proj") else {"w1", "w3"}
        return tuple(sorted(found))

    def check(self) -> None:
        """Raise `CheckpointError` naming the tensor for anything missing, left over or of a wrong shape."""
        self._used.clear()
        for tensor in hf_tensors(self.config).values():
            self._located(tensor)
        extra = sorted(set(self._tensors) - self._used)
        if extra:
            raise CheckpointError(f"{self.file}: {len(extra)} tensors that adapters of "
                                  f"{', '.join(self.config.targets)} do not have, first {extra[0]}")

    # -- Reading -----------------------------------------------------------------------------------------

    def _located(self, tensor: HFTensor) -> tuple[str, str, numpy.ndarray]:
        """Where a tensor is stored, its type, and its numbers in its shape."""
        name = next((name for name in names_in(self.config, tensor) if name in self._tensors), None)
        if name is None and tensor.rule.per_expert and self.config.dense_config is None:
            return self._fused(tensor)
        if name is None:
            raise CheckpointError(f"{self.file}: {names_in(self.config, tensor)[0]} is missing")
        stored = self._stored(name, tensor.shape)
        return name, stored.dtype, stored.data

    def _stored(self, name: str, shape: tuple[int, ...]) -> Stored:
        self._used.add(name)
        stored = self._tensors[name]
        if not isinstance(stored, Stored) or stored.data is None:
            raise CheckpointError(f"{self.file}: {name} is not of a type that adapters have ({', '.join(FLOATS)})")
        if stored.shape != shape:
            raise CheckpointError(f"{self.file}: {name} has shape {stored.shape}, expected {shape} by rank "
                                  f"{self.config.rank} and the base's architecture")
        return stored

    def _fused(self, tensor: HFTensor) -> tuple[str, str, numpy.ndarray]:
        """An expert's matrix out of those of a layer; what lies beside the diagonal blocks must be zero."""
        parts, (rows, columns) = len(tensor.rule.pieces), tensor.shape
        experts, rank = self.config.num_local_experts, parts * self.config.rank
        place = fused_name(self.config, tensor)
        if place not in self._tensors:
            raise CheckpointError(f"{self.file}: {tensor.name} is missing, and {place} too")
        low = slice(tensor.piece * self.config.rank, (tensor.piece + 1) * self.config.rank)
        if tensor.rule.name.endswith("_A"):
            stored = self._stored(place, (experts * rank, columns))
            return place, stored.dtype, stored.data.reshape(experts, rank, columns)[tensor.expert, low]
        stored = self._stored(place, (parts * rows, rank * experts))
        own = stored.data.reshape(parts, rows, rank, experts)[tensor.piece, :, :, tensor.expert]
        beside = numpy.delete(own, numpy.r_[low], axis=1)
        if (beside << 1).any():  # the sign of a zero does not matter
            raise CheckpointError(
                f"{self.file}: {place} mixes w1 and w3 of expert {tensor.expert} in one adapter of rank {rank}, as "
                "PEFT trains them on transformers 5; only adapters of w1 and w3 each for itself can be told apart")
        return place, stored.dtype, own[:, low]

    def dtype(self, tensor: HFTensor) -> str:
        return self._located(tensor)[1]

    def fragments(self, tensor: HFTensor) -> list[Fragment]:
        """The whole tensor as one memory-mapped fragment."""
        name, dtype, data = self._located(tensor)
        return [Fragment(0, tensor.view[tensor.rule.shard_dim], data.reshape(tensor.view), dtype,
                         f"{self.file} ({name})")]
