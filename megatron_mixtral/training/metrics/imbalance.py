"""One number for how unevenly tokens are spread over experts. Used by the figures of a step and by their pictures."""

from collections.abc import Sequence
from dataclasses import dataclass


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
