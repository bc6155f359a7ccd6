"""The least hardware for each use of the published Mixtrals: the smallest number of devices on which it fits."""

import math
from dataclasses import replace

from megatron_mixtral.config import AdapterConfig, MixtralConfig, preset
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.planning.memory import fullest_stage, stage_memory
from megatron_mixtral.planning.search import MEMORY_SHARE, RESERVED, Question, shapes
from megatron_mixtral.planning.shape import CacheShape, RunShape
from megatron_mixtral.planning.step_time import Machine

MODELS = {"4x7B": "mixtral-4x7b", "8x7B": "mixtral-8x7b", "8x22B": "mixtral-8x22b"}
COUNTS = tuple(2**power for power in range(9))  # numbers of devices to try: 1 to 256
SEQUENCE, BATCH, RANK = 4096, 256, 16
USES = {"pretraining, full tuning": 18.0, "LoRA": 2.0, "QLoRA": 0.5, "generation": 2.0}  # bytes a parameter, at least
FULL = next(iter(USES))


def least_devices(config: MixtralConfig, use: str, memory: float) -> int | None:
    """The fewest devices of `memory` GB (1e9 bytes) on which one of `USES` fits; None where `COUNTS` are too few.

    In bf16, rows of `SEQUENCE` tokens, one at a time: all of the model trained, or adapters of `RANK` on all its
    linears, or a text of that length generated. Any layout and recomputation; what fits need not be fast.
    """
    return next((count for count in COUNTS if _fits(config, use, count, memory * 1e9)), None)


def _fits(config: MixtralConfig, use: str, count: int, memory: float) -> bool:
    question = Question(config, Machine(devices=count), SEQUENCE, BATCH, (1,))
    room = memory * MEMORY_SHARE - RESERVED
    if count * room < config.total_parameters * USES[use]:  # spares the search
        return False
    # Virtual stages hold more activations, never fewer.
    return any(_needs(shape, use) <= room for shape in shapes(question) if shape.layout.vpp == 1)


def _needs(shape: RunShape, use: str) -> float:
    """Bytes of the fullest device, without the reserve."""
    config = shape.config
    if use == "generation":
        cache = CacheShape(1, SEQUENCE)
        return max(2 * shape.parameters_of_stage(stage).total
                   + cache.size(config, shape.layout.tp, shape.layers_of_stage(stage), 2)
                   for stage in (0, shape.layout.pp - 1))  # fmt: skip
    if use != FULL:
        shape = replace(shape, adapter=AdapterConfig.of(config, rank=RANK, quantized=use == "QLoRA"))
    return stage_memory(shape, fullest_stage(shape)).total


def least_hardware(memories: tuple[float, ...]) -> list[str]:
    """The table in Markdown: a row for each model and use, a column for each size of device, in GB."""
    if not memories or not all(0 < memory < math.inf for memory in memories):
        raise ConfigError(f"sizes of devices must be positive, found {memories}")
    lines = ["| | " + " | ".join(f"{memory:g} GB" for memory in memories) + " |", "|---" * (len(memories) + 1) + "|"]
    for name, known in MODELS.items():
        for use in USES:
            found = (least_devices(preset(known), use, memory) for memory in memories)
            lines.append(f"| {name}, {use} | " + " | ".join(str(one or f"over {COUNTS[-1]}") for one in found) + " |")
    return lines
