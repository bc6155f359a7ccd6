"""A dense Mistral, Llama or InternLM2 read as the Mixtral that it becomes: each expert a copy of its MLP, a new router.

With identical experts the weights of the chosen ones add up to one, so the Mixtral computes what the dense model did;
training then makes the experts differ ("Sparse Upcycling", Komatsuzaki et al. 2022). Streamed like every conversion.
"""

import dataclasses
import zlib
from pathlib import Path

import numpy

from megatron_mixtral.config import MixtralConfig
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.weights.dtypes import FLOATS, cast
from megatron_mixtral.weights.edits.dense import DenseSource
from megatron_mixtral.weights.protocols import Fragment
from megatron_mixtral.weights.rules import ROUTER, HFTensor

BLOCK = 1 << 20  # numbers that get their noise at a time
AUX_LOSS = 0.02  # the coefficient of the published Mixtrals


def mixtral_of(directory: str | Path, experts: int = 8, top_k: int = 2) -> MixtralConfig:
    """The Mixtral that a dense model's config.json becomes. Raises `ConfigError` where no Mixtral computes the same."""
    dense = MixtralConfig.from_hf_dir(directory)
    if dense.dense_config is None:
        raise ConfigError(f"{Path(directory) / 'config.json'}: model_type is 'mixtral', expected a dense model's, out "
                          "of which a Mixtral can be made")
    return dataclasses.replace(dense, num_local_experts=experts, num_experts_per_tok=top_k,
                               router_aux_loss_coef=AUX_LOSS, dense_config=None)


class UpcycledSource(DenseSource):
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

    def fragments(self, tensor: HFTensor) -> list[Fragment]:
        """The whole tensor as one fragment: mapped, or made."""
        if tensor.rule is ROUTER:
            values = self._draw(tensor).standard_normal(tensor.shape, numpy.float32)
            values *= numpy.float32(self._router_std)
            kind = self.dtype(tensor)
            data = cast(values.view("<u4"), "float32", kind)
            return [Fragment(0, len(data), data, kind, f"the router of layer {tensor.layer}, from seed {self._seed}")]
        found = super().fragments(tensor)
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
