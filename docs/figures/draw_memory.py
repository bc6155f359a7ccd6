"""Draws what training Mixtral-8x7B takes of a device: whole, LoRA or QLoRA, by sharding and recomputation.

    python docs/figures/draw_memory.py

The picture of docs/finetuning.md, and on standard output its table, both by the planner's arithmetic.
"""

# ruff: noqa: T201
import sys
from pathlib import Path

from megatron_mixtral.config import AdapterConfig, ParallelLayout, preset
from megatron_mixtral.planning import RESERVED, RunShape, fullest_stage, stage_memory

FILE = Path(__file__).resolve().parent / "memory-of-tuning.png"
MODEL, RANK, SEQUENCE, MICRO, BATCH = preset("mixtral-8x7b"), 64, 2048, 4, 256
WAYS = {"full": None, "LoRA": AdapterConfig.of(MODEL, rank=RANK),
        "QLoRA": AdapterConfig.of(MODEL, rank=RANK, quantized=True)}
SHARDINGS = {  # name: (layout, whether the optimizer is distributed)
    "1 device, or replicas": (ParallelLayout(world=1), False),
    "dp8, distributed optimizer": (ParallelLayout(world=8), True),
    "ep8, distributed optimizer": (ParallelLayout(ep=8, world=8), True),
    "ep8 x 4, distributed optimizer": (ParallelLayout(ep=8, world=32), True),
    "ep8-pp4, distributed optimizer": (ParallelLayout(ep=8, pp=4, world=32), True),
}
RECOMPUTE = ("none", "selective", "full")
DEVICE = 80e9


def memory(way: str, sharding: str, recompute: str) -> dict[str, float]:
    """Bytes of the fullest device, by kind."""
    layout, distributed = SHARDINGS[sharding]
    shape = RunShape(MODEL, layout, SEQUENCE, MICRO, BATCH, recompute, distributed_optimizer=distributed,
                     adapter=WAYS[way])
    return vars(stage_memory(shape, fullest_stage(shape)))


def table() -> list[str]:
    """GB of a device, without the reserve."""
    lines = ["| | recomputed | " + " | ".join(WAYS) + " |", "|---|---|" + "---:|" * len(WAYS)]
    return lines + [f"| {sharding} | {recompute} | " + " | ".join(
        f"{sum(memory(way, sharding, recompute).values()) / 1e9:.1f}" for way in WAYS) + " |"
        for sharding in SHARDINGS for recompute in RECOMPUTE]


def draw() -> None:
    """A panel for each way, a bar for each sharding and recomputation, in the order of the table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = plt.get_cmap("Set2")
    figure, panels = plt.subplots(1, len(WAYS), figsize=(14, 6.2), sharey=True)
    rows = [(sharding, recompute) for sharding in SHARDINGS for recompute in RECOMPUTE]
    places = [index + index // len(RECOMPUTE) * 0.6 for index in range(len(rows))]
    for axes, way in zip(panels, WAYS, strict=True):
        left = [0.0] * len(rows)
        for number, kind in enumerate(memory(way, *rows[0])):
            sizes = [memory(way, *row)[kind] / 1e9 for row in rows]
            axes.barh(places, sizes, left=left, color=colours(number), label=kind)
            left = [before + size for before, size in zip(left, sizes, strict=True)]
        axes.axvline((DEVICE - RESERVED) / 1e9, color="0.3", linestyle="--", linewidth=1)
        axes.set_title(f"{way}: GB of a device", fontsize=11)
        axes.set_xlim(0, {"full": 950}.get(way, 250))
    panels[0].set_yticks(places, [f"{sharding}: {recompute}" for sharding, recompute in rows], fontsize=8.5)
    panels[0].invert_yaxis()
    panels[-1].legend(loc="lower right", fontsize=9)
    figure.suptitle(f"Mixtral-8x7B in bf16, adapters of rank {RANK}, micro-batches of {MICRO} x {SEQUENCE} tokens; "
                    "dashed: 80 GB less the planner's reserve", fontsize=11)
    figure.tight_layout()
    figure.savefig(FILE, dpi=100, metadata={"Software": None})
    plt.close(figure)


def main() -> int:
    print("\n".join(table()))
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
