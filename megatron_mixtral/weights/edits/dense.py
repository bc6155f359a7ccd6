"""A dense Mistral, Llama or InternLM2 read as the Mixtral of one expert that it is; `formats/hf_sink` writes it back.

Its MLP is the expert. A router is made: zeros, for whatever it says, one expert gets all of a token.
"""

import dataclasses
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import numpy

from megatron_mixtral.config import MixtralConfig
from megatron_mixtral.weights.dtypes import FLOATS
from megatron_mixtral.weights.formats import HFSource
from megatron_mixtral.weights.plan import TensorSlice, hf_slices
from megatron_mixtral.weights.protocols import Fragment, narrow
from megatron_mixtral.weights.rules import FC1, ROUTER, HFTensor


class DenseSource(HFSource):
    """A Hugging Face directory of a dense model, read as `config` (default: the Mixtral of one expert). With more
    experts, each is a copy of the MLP.

    Raises `ConfigError` for a config.json that no Mixtral computes, `CheckpointError` for unreadable files.
    """

    def __init__(self, directory: str | Path, config: MixtralConfig | None = None) -> None:
        dense = MixtralConfig.from_hf_dir(directory)
        self._slices = {piece.name: one for one in hf_slices(dense) for piece in one.pieces}
        super().__init__(directory, dense if config is None else config)

    def _stored(self) -> Iterable[HFTensor]:
        return {one.name: _of(one) for one in self._slices.values()}.values()

    def _slice(self, tensor: HFTensor) -> TensorSlice:
        """What of the dense model a tensor is of: a router has none, and is of its layer's MLP."""
        rule = FC1 if tensor.rule is ROUTER else tensor.rule
        return self._slices[rule.hf_names(tensor.layer, 0)[0 if tensor.rule is ROUTER else tensor.piece]]

    def dtype(self, tensor: HFTensor) -> str:
        """The name of the type a tensor is stored in; a router has that of its layer's MLP."""
        return super().dtype(_of(self._slice(tensor)))

    def fragments(self, tensor: HFTensor) -> list[Fragment]:
        """The whole tensor as one fragment: mapped, or (a router) zeros."""
        if tensor.rule is ROUTER:
            kind = self.dtype(tensor)
            data = numpy.zeros(tensor.view, FLOATS[kind].carrier)
            return [Fragment(0, len(data), data, kind, f"the router of layer {tensor.layer}, made for {self.where}")]
        one = self._slice(tensor)
        found, dim = super().fragments(_of(one)), one.rule.join_dim
        if len(one.pieces) == 1:
            return found
        ends = list(accumulate(piece.view[dim] for piece in one.pieces))
        length = tensor.view[dim]
        return [dataclasses.replace(part, data=narrow(part.data, dim, ends[tensor.piece] - length, length))
                for part in found]


def _of(one: TensorSlice) -> HFTensor:
    """A stored tensor of the dense model, of its own name and whole view."""
    return dataclasses.replace(one.pieces[0], name=one.name, view=one.view)
