"""A dense Mistral or Llama read as the Mixtral that it becomes: every expert a copy of its MLP, and a new router.

With identical experts the weights of the chosen ones add up to one, so the Mixtral computes what the dense model did;
training then makes the experts differ ("Sparse Upcycling", Komatsuzaki et al. 2022). Streamed like every conversion.
"""

import dataclasses
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy

from megatron_mixtral.config import MixtralConfig, read_json
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.weights.dtypes import FLOATS, cast
from megatron_mixtral.weights.formats import HFSource
from megatron_mixtral.weights.protocols import Fragment
from megatron_mixtral.weights.rules import FC1, ROUTER, HFTensor, hf_tensors

DENSE = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # of an expert -> of the dense model's MLP
BLOCK = 1 << 20  # numbers that get their noise at a time

# What transformers assumes for keys that a config.json lacks, where it is not what it assumes for a Mixtral.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"rms_norm_eps": 1e-6, "sliding_window": 4096},
    "llama": {"rms_norm_eps": 1e-6, "intermediate_size": 11008, "num_key_value_heads": None,
              "max_position_embeddings": 2048},
}
DENSE_ROPE_THETA = 10000.0
FOREIGN = ("sliding_window",)  # keys that a Llama does not heed and a Mixtral does


def mixtral_of(directory: str | Path, experts: int = 8, top_k: int = 2) -> MixtralConfig:
    """The Mixtral that a dense model's config.json becomes. Raises `ConfigError` where no Mixtral computes the same."""
    path = Path(directory) / "config.json"
    dense = read_json(path)
    kind = dense.get("model_type")
    if kind not in DEFAULTS:
        raise ConfigError(f"{path}: model_type is {kind!r}, expected {' or '.join(DEFAULTS)}; no Mixtral computes what "
                          "another model does")
    if kind == "llama":
        dense = {key: value for key, value in dense.items() if key not in FOREIGN}
    parameters = dense.get("rope_parameters") or {}
    if dense.get("rope_theta") is None and parameters.get("rope_theta") is None:
        dense = dense | {"rope_theta": DENSE_ROPE_THETA}
    values = DEFAULTS[kind] | dense | {"model_type": "mixtral", "num_local_experts": experts,
                                       "num_experts_per_tok": top_k, "router_aux_loss_coef": 0.02}
    return MixtralConfig.from_hf_dict(values, where=str(path))


class UpcycledSource(HFSource):
    """The Mixtral of `experts` experts that a dense Hugging Face directory becomes.

    The router is drawn from a normal distribution of standard deviation `router_std`. With `expert_noise` every expert
    gets noise of its own, normal, of that share of each matrix's root mean square. What is drawn depends on `seed` and
    the tensor's name only. Raises `ConfigError` for a model that cannot be upcycled, `CheckpointError` for its files.
    """

    def __init__(self, directory: str | Path, experts: int = 8, top_k: int = 2, *, seed: int = 1234,
                 router_std: float = 0.02, expert_noise: float = 0.0) -> None:
        if not (router_std >= 0 and expert_noise >= 0 and seed >= 0):
            raise ConfigError(f"--router-std {router_std}, --expert-noise {expert_noise} and --seed {seed} must not be "
                              "negative")
        super().__init__(directory, mixtral_of(directory, experts, top_k))
        self._seed, self._router_std, self._noise = seed, router_std, expert_noise

    def _stored(self) -> Iterable[HFTensor]:
        return [_dense(tensor) for tensor in hf_tensors(self.config).values()
                if tensor.rule is not ROUTER and tensor.expert == 0]

    def dtype(self, tensor: HFTensor) -> str:
        """The name of the type a tensor is stored in; a router has that of its layer's MLP."""
        if tensor.rule is ROUTER:
            tensor = hf_tensors(self.config)[FC1.hf_names(tensor.layer, 0)[0]]
        return super().dtype(_dense(tensor))

    def fragments(self, tensor: HFTensor) -> list[Fragment]:
        """The whole tensor as one fragment: mapped, or made."""
        if tensor.rule is ROUTER:
            values = self._draw(tensor).standard_normal(tensor.shape, numpy.float32)
            values *= numpy.float32(self._router_std)
            kind = self.dtype(tensor)
            data = cast(values.view("<u4"), "float32", kind)
            return [Fragment(0, len(data), data, kind, f"the router of layer {tensor.layer}, from seed {self._seed}")]
        found = super().fragments(_dense(tensor))
        if tensor.rule.per_expert and self._noise:
            return [dataclasses.replace(one, data=self._noisy(one, self._draw(tensor))) for one in found]
        return found

    def _draw(self, tensor: HFTensor) -> numpy.random.Generator:
        return numpy.random.default_rng([self._seed, zlib.crc32(tensor.name.encode())])

    def _noisy(self, fragment: Fragment, draw: numpy.random.Generator) -> numpy.ndarray:
        """The bit patterns with noise added, computed in float32 (float64 for float64) a block at a time."""
        kind = fragment.dtype
        wide = FLOATS["float64" if kind == "float64" else "float32"]
        numbers = numpy.dtype(f"<f{wide.itemsize}")
        old, new = fragment.data.reshape(-1), numpy.empty(fragment.data.size, fragment.data.dtype)

        def block(at: int) -> numpy.ndarray:
            return cast(old[at:at + BLOCK], kind, wide.name).view(numbers)

        steps = range(0, len(old), BLOCK)
        squares = sum(float(numpy.square(block(at), dtype=numpy.float64).sum()) for at in steps)
        scale = numbers.type(self._noise * (squares / len(old)) ** 0.5)
        for at in steps:
            values = block(at)
            noisy = values + scale * draw.standard_normal(len(values), numbers.type)
            new[at:at + BLOCK] = cast(noisy.view(wide.carrier), wide.name, kind)
        return new.reshape(fragment.data.shape)


def _dense(tensor: HFTensor) -> HFTensor:
    """The dense model's tensor that becomes this one: of an expert the MLP's, else the one of the same name."""
    if not tensor.rule.per_expert:
        return tensor
    part = DENSE[tensor.name.split(".")[-2]]
    return dataclasses.replace(tensor, name=f"model.layers.{tensor.layer}.mlp.{part}.weight")
