"""The least time that a GPU needs for a layer of Mixtral-8x7B in training: an estimate from a rehearsed step.

    PYTHONPATH=.:tests python -m helpers.roofline h100-sxm

Every operation takes what is longer, its FLOPs at the chip's peak or its bytes (of all inputs and outputs, once) at its
memory's bandwidth; what torch.compile fuses is one operation. No chip reaches either figure: a bound, no prediction. A
layer is the difference between steps of two layers and of one.
"""

import math
import sys
from collections import defaultdict
from typing import Any

from helpers import fake_gpu, rehearsal

QUIET = ("empty", "new_empty", "detach", "lift", "_unsafe_view", "_reshape_alias", "alias", "wait_tensor")
SEQUENCES = 2  # of a micro-batch, 4,096 tokens each
UPDATING = "optimizer and clipping, once a step"


def tensors_of(value: Any) -> list[Any]:
    import torch

    found: dict[int, Any] = {}
    torch.utils._pytree.tree_map_only(torch.Tensor, lambda one: found.setdefault(id(one), one), value)
    return [one for one in found.values() if one.is_cuda]


class Account:
    """FLOPs, bytes and least seconds by part."""

    def __init__(self, device: Any) -> None:
        self.flops_rate, self.bytes_rate = device.tflops * 1e12, device.bandwidth * 1e9
        self.parts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    def add(self, part: str, flops: float, tensors: list[Any]) -> None:
        size = sum(one.numel() * one.element_size() for one in tensors)
        seconds = max(flops / self.flops_rate, size / self.bytes_rate)
        self.parts[part] = [a + b for a, b in zip(self.parts[part], (flops, size, seconds), strict=True)]


def part_of(name: str, tensors: list[Any], vocabulary: int, width: int) -> str:
    sides = {side for one in tensors for side in one.shape}
    if "attention" in name:
        return "attention, the scores"
    if name.startswith(("_grouped_mm", "mm", "addmm", "bmm")):
        experts = {width, 2 * width} & sides
        head = "output layer, products" if vocabulary in sides else "linears, products"
        return "experts, products" if experts else head
    if vocabulary in sides:
        return "loss"
    if "swiglu" in name or {width, 2 * width} & sides:
        return "SwiGLU"
    if name == "_turn":
        return "rotary positions"
    if name.startswith(("index_select", "argsort", "sort", "sum", "index", "gather", "scatter")):
        return "moves of tokens"
    return "norms, residual sums and the rest"


def watch(account: Account, vocabulary: int, width: int) -> Any:
    """The dispatch mode that counts."""
    import torch
    from megatron.core.optimizer.optimizer import ChainedOptimizer
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry, shape_wrapper

    updating: list[bool] = []
    step = ChainedOptimizer.step

    def update(self: Any) -> Any:
        updating.append(True)
        try:
            return step(self)
        finally:
            updating.pop()

    ChainedOptimizer.step = update
    known = flop_registry | {key: shape_wrapper(formula) for key, formula in rehearsal.products().items()}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            name = str(function).removeprefix("aten.")
            counts = function.namespace == "aten" and not function.is_view and not name.startswith(QUIET)
            if counts and not fake_gpu.fused:
                tensors = tensors_of((args, kwargs, out))
                formula = known.get(function._overloadpacket)
                flops = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
                part = UPDATING if updating else part_of(name, tensors, vocabulary, width)
                account.add(part, flops, tensors)
            return out

    fake_gpu.on_fused.append(lambda name, given, found: account.add(
        part_of(name, tensors_of((given, found)), vocabulary, width), 0, tensors_of((given, found))))
    assert torch.cuda.is_available()
    return Watch()


def step(layers: int, device: Any) -> dict[str, list[float]]:
    """Of a whole step: [FLOPs, bytes, least seconds] by part."""
    import dataclasses

    import torch

    from helpers.footprint import measure
    from megatron_mixtral.config import preset

    model = dataclasses.replace(preset("mixtral-8x7b"), num_hidden_layers=layers)
    account = Account(device)
    fake_gpu.on_fused.clear()
    mode = watch(account, model.vocab_size, model.intermediate_size)
    with fake_gpu.ranks(0, 1), mode:
        fake_gpu.connect(lambda tensor, group: None)
        measure(0, model, {}, torch.bfloat16, 1, rehearsal.SEQUENCE, rehearsal.AS_TRAINED, ready=account.parts.clear,
                micro_batch=SEQUENCES)
    return account.parts


def table(device: Any) -> list[str]:
    """In Markdown, as docs/performance.md has it."""
    one, two = step(1, device), step(2, device)
    rows = {part: [b - a for a, b in zip(one.get(part, [0.0] * 3), two[part], strict=True)] for part in two}
    updating = rows.pop(UPDATING)

    def line(part: str, row: list[float], bound: str) -> str:
        return f"| {part} | {row[0] / 1e12:.2f} | {row[1] / 1e9:.2f} | {1e3 * row[2]:.2f} | {bound} |"

    def bound(row: list[float]) -> str:
        return "products" if math.isclose(row[0] / device.tflops / 1e12, row[2], rel_tol=0.3) else "memory"

    parts = sorted((item for item in rows.items() if item[1][2] > 1e-6), key=lambda item: -item[1][2])
    whole = [sum(row[index] for _, row in parts) for index in range(3)]
    return ["| part | TFLOP | GB | at least ms | bound by |", "|---|---|---|---|---|",
            *(line(part, row, bound(row)) for part, row in parts),
            line("forward and backward", whole, "").replace("|  |", "| |"), line(UPDATING, updating, bound(updating))]


def main(names: list[str]) -> int:
    rehearsal.start()
    from megatron_mixtral.config import hardware

    for name in names or ["h100-sxm"]:
        print("\n".join(table(hardware.named(name))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
