"""The planner's predictions as tables of docs/parallelism.md: beside published runs of Mixtral, at sizes that nobody
published, and for long sequences.

    python benchmarks/published_runs.py         what it prints goes into the page; a test holds the two together

Sources of the published runs: Megatron-LM, megatron/core/transformer/moe/README.md at core_v0.9.0 (8x7B on 64);
Megatron-MoE-ModelZoo, best_practice/Mixtral (8x22B on 128); Megatron-LM issue 756 (8x7B on 16, twice: as it was asked
about, on an engine of March 2024, and after advice: the alltoall dispatcher, a newer grouped_gemm, trained weights, EP8
TP2); ModelLink's README of Mixtral (8x7B on 16, device not named: rates of an A100 80 GB and full recomputation are
assumed).
Megatron-LM's log counts attention over the whole square of the sequence; its figures are compared in this convention.

Of issue 756 two things are inferred. Its sequences are of 2,048 tokens: its log has 5.5235 s and 236.4 TFLOP/s for 128
of them, which is 236.4 with 2,048 and 492 with 4,096. And ETP is TP: that engine cut experts as it cut attention, and
had EP divide the data-parallel size, 4 in its first log.
"""

import sys
from dataclasses import dataclass

import _clone  # noqa: F401 - makes the imports below work

from megatron_mixtral.config import MixtralConfig, ParallelLayout, preset
from megatron_mixtral.planning import (
    Machine,
    RunShape,
    fullest_stage,
    model_flops_rate,
    predicted_step,
    stage_memory,
)

A100 = {"device_tflops": 312.0, "device_bandwidth": 2039.0, "intra_node_gbps": 2400.0, "inter_node_gbps": 200.0}


@dataclass(frozen=True)
class Published:
    """One published figure: TFLOP/s per device in Megatron-LM's convention, or tokens/s per device."""

    name: str
    model: str
    layout: ParallelLayout
    batch: int
    machine: Machine
    tflops: float | None = None
    tokens: float | None = None
    recompute: str = "none"
    seq_length: int = 4096
    used: bool = False  # to set the planner's constants


RUNS = (
    Published("8x7B, 64 H100", "mixtral-8x7b", ParallelLayout(ep=8, pp=4, vpp=8, world=64), 256, Machine(64),
              tflops=468, used=True),
    Published("8x22B, 128 H100", "mixtral-8x22b", ParallelLayout(tp=2, ep=8, etp=1, pp=8, world=128), 256,
              Machine(128), tflops=455, used=True),
    Published("8x7B, 16 H100, March 2024", "mixtral-8x7b", ParallelLayout(tp=4, ep=4, world=16), 128, Machine(16),
              tflops=130, seq_length=2048),
    Published("8x7B, 16 H100, after advice", "mixtral-8x7b", ParallelLayout(tp=2, ep=8, world=16), 128, Machine(16),
              tflops=236.4, seq_length=2048),
    Published("8x7B, 16 devices", "mixtral-8x7b", ParallelLayout(ep=2, pp=8, world=16), 128, Machine(16, **A100),
              tokens=1139.3, recompute="full"),
)


def megatron_share(model: MixtralConfig, seq_length: int) -> float:
    """Megatron-LM's count of a token's FLOPs over ours: attention is not halved for being causal."""
    other_half = 6 * model.num_hidden_layers * seq_length * model.num_attention_heads * model.head_dim
    return 1 + other_half / model.training_flops_per_token(seq_length)


def row(run: Published) -> str:
    model = preset(run.model)
    shape = RunShape(model, run.layout, run.seq_length, 1, run.batch, run.recompute)
    seconds = predicted_step(shape, run.machine).total
    if run.tflops is not None:
        unit, published = "TFLOP/s", run.tflops
        predicted = model_flops_rate(shape, seconds) * megatron_share(model, run.seq_length) / 1e12
    else:
        unit, published, predicted = "tokens/s", run.tokens, shape.tokens / seconds / run.layout.world
    error = 100 * (predicted / published - 1)
    mfu = model_flops_rate(shape, seconds) / run.machine.device_tflops / 1e12
    return (f"| {run.name} | {run.layout} | {published:g} {unit} | {predicted:.0f} {unit} | {error:+.0f} % | "
            f"{100 * mfu:.0f} % | {'yes' if run.used else 'no'} |")


def published() -> list[str]:
    head = ["| run | layout | published | predicted | error | predicted MFU | used to set the constants |",
            "|---|---|---|---|---|---|---|"]
    return [*head, *map(row, RUNS)]


LARGER = (("mixtral-8x7b", ParallelLayout(ep=8, pp=4, vpp=8, world=64), 256),
          ("mixtral-8x7b", ParallelLayout(tp=2, pp=4, ep=4, world=256), 1024),
          ("mixtral-8x22b", ParallelLayout(tp=2, pp=8, ep=8, etp=1, world=256), 512),
          ("mixtral-8x22b", ParallelLayout(tp=4, pp=4, ep=8, etp=1, world=1024), 2048))
COMMUNICATION = ("tensor", "expert_tensor", "expert", "context", "pipeline", "replicas")  # terms of a step


def larger() -> list[str]:
    """Layouts of which the rehearsal counts what is sent."""
    lines = ["| model, GPUs | layout | global batch | idle pipeline | communication | predicted MFU |",
             "|---|---|---|---|---|---|"]
    for model, layout, batch in LARGER:
        shape, machine = RunShape(preset(model), layout, 4096, 1, batch), Machine(layout.world)
        step = predicted_step(shape, machine)
        sent = sum(getattr(step, name) for name in COMMUNICATION)
        mfu = model_flops_rate(shape, step.total) / machine.device_tflops / 1e12
        lines.append(f"| {model.removeprefix('mixtral-').replace('b', 'B')}, {layout.world:,} | {layout} | {batch:,} | "
                     f"{100 * step.bubble / step.total:.0f} % | {100 * sent / step.total:.0f} % | {100 * mfu:.0f} % |")
    return lines


def long_sequences() -> list[str]:
    """8x7B, 32,768 tokens, 32 devices, 32 sequences a step: memory of the fullest device, seconds of a step."""
    lines = ["| layout | none | selective | full |", "|---|---|---|---|"]
    for sizes in ({}, {"cp": 2}, {"cp": 4}, {"cp": 8}, {"tp": 2}, {"tp": 2, "cp": 4}, {"tp": 8}):
        layout = ParallelLayout(pp=4, ep=8, etp=1, world=32, **sizes)
        cells = []
        for recompute in ("none", "selective", "full"):
            shape = RunShape(preset("mixtral-8x7b"), layout, 32768, 1, 32, recompute)
            memory, step = stage_memory(shape, fullest_stage(shape)), predicted_step(shape, Machine(32))
            cells.append(f"{memory.total / 1e9:.0f} GB, {step.total:.1f} s")
        lines.append(f"| {layout} | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    sys.stdout.write("\n\n".join("\n".join(table()) for table in (published, larger, long_sequences)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
