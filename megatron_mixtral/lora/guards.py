"""What a run that trains adapters must show in its first steps, or end: that every one of them is trained.

Frozen parameters make silent failures possible: a graph without gradients, a hook or an optimizer that leaves
something out. The loss falls all the same as long as something learns.
"""

import logging
from typing import Any

import torch

from megatron_mixtral.config import AdapterConfig, Coord, ParallelLayout
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.weights import ShardPlan

logger = logging.getLogger(__name__)

NAMED = 3  # offenders that a message names
_CURE = ("this is a fault of the program or of a flag that it does not know: please report it with the command line; "
         "recomputation, overlap and fusion flags are the likely ones")


class Guard:
    """Watches the adapters of a run on this rank. Every rank calls every method at the same point."""

    def __init__(self, adapter: AdapterConfig, masked: bool = False) -> None:
        """`masked`: not every token is trained. Then an expert of the last layer may get none that is, for nothing
        behind it attends to the others; in the layers before, a question's tokens are attended to by its answer's.
        """
        self._adapter, self._masked, self._steps, self._done = adapter, masked, 0, False
        self._watched: list[tuple[Any, torch.nn.Parameter]] = []  # what the plan says of each lora_B, and where it is

    def watch(self, model: torch.nn.Module, coord: Coord, layout: ParallelLayout, chunk: int) -> None:
        """Note a model chunk's parameters. `ConfigError` unless those that are trained are exactly its adapters."""
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        planned = ShardPlan(self._adapter, layout, coord, chunk).tensors()
        found, expected = sum(one.numel() for one in trained.values()), sum(tensor.elements for tensor in planned)
        if found != expected or trained.keys() != {tensor.name for tensor in planned}:
            raise ConfigError(f"{len(trained)} tensors with {found:,} parameters would be trained on this rank, "
                              f"expected {len(planned)} with {expected:,} ({self._adapter.trained_parameters:,} on all "
                              f"ranks): {_CURE}")
        self._watched += [(tensor, trained[tensor.name]) for tensor in planned if tensor.rule.name.endswith("_B")]

    def look(self, tokens: torch.Tensor) -> None:
        """After a step: every lora_B has had a gradient, and has changed. `tokens` [layers, experts] of all ranks are
        the step's. `ConfigError` where one has not, but for experts without a token, which are listed.

        A gradient that is not finite makes the engine skip the step; the next one is looked at. So it is where all B
        are zero still, once: a warm-up begins with a learning rate of zero.
        """
        if self._done:
            return
        sizes = self._sizes()
        if not all(gradient < float("inf") for gradient, _ in sizes.values()):
            return
        self._steps += 1
        last = self._adapter.num_hidden_layers - 1 if self._masked else None
        idle = {name for name, size in sizes.items() if ".experts." in name
                and (not tokens[_numbers(name)] or (_numbers(name)[0] == last and not size[0]))}
        for what, index in (("no gradient", 0), ("not changed", 1)):
            dead = [name for name, size in sizes.items() if not size[index] and name not in idle]
            if index == 1 and len(dead) == len(sizes) - len(idle) and self._steps == 1:
                return
            if dead:
                raise ConfigError(f"{len(dead)} of {len(sizes)} adapters have {what} after the first step"
                                  f"{' (the gradient norm is 0)' if index == 0 and len(dead) == len(sizes) else ''}, "
                                  f"first {', '.join(dead[:NAMED])}: {_CURE}")
        self._done = True
        if idle and torch.distributed.get_rank() == 0:
            logger.info("no %stoken of the first step went to %d experts' adapters, first %s",
                        "trained " * self._masked, len(idle), ", ".join(sorted(idle)[:NAMED]))

    def _sizes(self) -> dict[str, tuple[float, float]]:
        """PEFT's name of each lora_B -> the largest magnitude of its gradient and of itself, over all ranks."""
        own: dict[str, tuple[float, float]] = {}
        for tensor, parameter in self._watched:
            gradient = parameter.main_grad if hasattr(parameter, "main_grad") else parameter.grad
            for index, piece in enumerate(tensor.pieces):
                own[piece.name] = tuple(float(_part(one, tensor, index).abs().max()) for one in (gradient, parameter))
        ranks: list[dict[str, tuple[float, float]]] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, own)
        whole: dict[str, tuple[float, float]] = {}
        for one in ranks:
            for name, size in one.items():
                before = whole.get(name, (0.0, 0.0))
                whole[name] = (_larger(size[0], before[0]), _larger(size[1], before[1]))
        return whole


def _part(whole: torch.Tensor, tensor: Any, piece: int) -> torch.Tensor:
    """One piece's rows of a joined matrix."""
    if len(tensor.pieces) == 1:
        return whole.detach()
    dim = tensor.rule.join_dim
    return whole.detach().view(tensor.view).split([one.view[dim] for one in tensor.pieces], dim)[piece]


def _larger(one: float, other: float) -> float:
    """The larger; of a number and NaN the NaN."""
    return one if one != one or one > other else other


def _numbers(name: str) -> tuple[int, int]:
    """Layer and expert in the name of an expert's adapter."""
    words = name.split(".")
    return int(words[words.index("layers") + 1]), int(words[words.index("experts") + 1])
