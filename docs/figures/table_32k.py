"""Prints the table of docs/parallelism.md on 8x7B at 32,768 tokens: layouts against recomputation.

    python docs/figures/table_32k.py

Memory and seconds are the planner's.
"""

# ruff: noqa: T201
import sys

from megatron_mixtral.config import ParallelLayout, preset
from megatron_mixtral.planning import Machine, RunShape, fullest_stage, predicted_step, stage_memory

MODEL, SEQUENCE, BATCH, DEVICES = preset("mixtral-8x7b"), 32768, 32, 32
RECOMPUTE = ("none", "selective", "full")
SIZES = ({}, {"cp": 2}, {"cp": 4}, {"cp": 8}, {"tp": 2}, {"tp": 2, "cp": 4}, {"tp": 8})


def cell(layout: ParallelLayout, recompute: str) -> str:
    """Memory of the fullest device without the reserve, and a step."""
    shape = RunShape(MODEL, layout, SEQUENCE, 1, BATCH, recompute)
    memory = stage_memory(shape, fullest_stage(shape)).total
    return f"{memory / 1e9:.0f} GB, {predicted_step(shape, Machine(DEVICES)).total:.1f} s"


def table() -> list[str]:
    lines = ["| layout | " + " | ".join(RECOMPUTE) + " |", "|---|" + "---|" * len(RECOMPUTE)]
    for sizes in SIZES:
        layout = ParallelLayout(**sizes, pp=4, ep=8, etp=1, world=DEVICES)
        lines.append(f"| {layout} | " + " | ".join(cell(layout, one) for one in RECOMPUTE) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
    sys.exit(0)
