"""How many tokens each expert of each layer was given in a step, whatever the layout.

A hook on each router counts the routing map that it returns, so the count is what the experts really got: after the
engine's token dropping, if one was asked for, and without padding. `training/metrics/hooks.py` collects the counts of
all ranks once a step, and `Imbalance` makes one number of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter


@dataclass(frozen=True)
class Imbalance:
    """Tokens of a layer's busiest expert / tokens of its average expert: 1 is balanced, experts / top-k the worst."""

    mean: float  # over the layers
    worst: float  # of the most unbalanced layer
    worst_layer: int  # its number from 0

    @classmethod
    def of(cls, tokens: Sequence[Sequence[int]]) -> "Imbalance":
        """`tokens` [layers][experts]; a layer without tokens counts as balanced."""
        ratios = [max(layer) * len(layer) / sum(layer) if sum(layer) else 1.0 for layer in tokens]
        worst = max(range(len(ratios)), key=ratios.__getitem__)
        return cls(sum(ratios) / len(ratios), ratios[worst], worst)


class ExpertLoad:
    """Counts the tokens of each expert on this rank, and adds up those of all ranks."""

    def __init__(self, layers: int, experts: int, device: str) -> None:
        self._layers, self._experts, self._device = layers, experts, device
        self._counts: dict[int, torch.Tensor] = {}  # layer number, from 1 -> [experts] int64 on the router's device

    def watch(self, model: torch.nn.Module) -> None:
        """Count in every router of a pipeline stage or model chunk from now on."""
        for module in model.modules():
            if isinstance(module, TopKRouter):
                module.register_forward_hook(self._count)

    def _count(self, router: Any, inputs: tuple[Any, ...], outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        # A recomputed layer runs twice, first without gradients; validation runs with `training` off.
        if not (router.training and torch.is_grad_enabled()):
            return
        _, chosen = outputs  # [tokens of this rank, experts] bool
        padding = inputs[1] if len(inputs) > 1 else None  # [sequence, batch], True at padding
        if padding is None:
            padding = getattr(router, "noted_padding", None)
        if padding is not None:
            chosen = chosen & ~padding.reshape(-1, 1)
        counts = chosen.sum(dim=0)
        held = self._counts.get(router.layer_number)
        self._counts[router.layer_number] = counts if held is None else held + counts

    def collect(self) -> torch.Tensor:
        """[layers, experts] int64: the tokens of all ranks since the last call; every rank calls it.

        One sum over all ranks is right in every layout: ranks of different pipeline stages hold different layers, and
        all others see different tokens (of data-, expert- and context-parallel ranks each its own, of tensor-parallel
        ranks each its part of the sequence: the engine's MoE layer insists on sequence parallelism).
        """
        total = torch.zeros(self._layers, self._experts, dtype=torch.int64, device=self._device)
        for number, counts in self._counts.items():
            total[number - 1] = counts
        self._counts.clear()
        torch.distributed.all_reduce(total)
        return total
