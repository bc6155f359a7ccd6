#!/usr/bin/env python3
"""Time a training step of a Mixtral of a few layers, in turns: this library, the engine's stock parts, transformers.

    python benchmarks/train_step.py                                  what fits the machine: GPU or CPU widths
    python benchmarks/train_step.py --dtype fp32 --rounds 5 --json step.json
    torchrun --nproc-per-node 2 benchmarks/train_step.py --ep 2      on several ranks, communication included

On a GPU the layers have Mixtral-8x7B's width (hidden 4096, ffn 14336, 8 experts, top-2, 32/8 heads, sequence 4096); on
a CPU they are narrow (hidden 512, ffn 1792, 8/2 heads, sequence 512, 4 layers). The vocabulary is Mixtral's.

- `ours`: this library's model as `tools/pretrain_mixtral.py` builds it, with its optimizer.
- `stock`: the engine's local layer specification (`get_gpt_layer_local_spec`), and the optimizer and clipping that the
  engine has where neither transformer-engine nor apex is installed (`torch.optim.AdamW`, tensor by tensor).
- `transformers`: MixtralForCausalLM, `grouped_mm` experts, SDPA, `torch.optim.AdamW(fused=True)`. In bf16 weights and
  optimizer state are bf16 alone, in which most updates of a real run are too small to change a weight.
- `autocast`: the same with weights, gradients and optimizer state in fp32 and `torch.autocast` to bf16, as its users
  train. This, not the row before, keeps what `ours` and `stock` keep in bf16.
- `te`: the engine's transformer-engine specification, where it can be imported.
- `lora`, `qlora` and `peft` (`--lora`, `--qlora`): adapters of rank 16 are trained, in `qlora` beside a base of 4 bits.

Each runs in a process of its own (`step_processes.py`), in turns with the others; only `ours` has this library's heap
settings on a CPU, unless `--same-heap` gives them to all. Prints medians over the rounds: forward + backward, and the
whole step with optimizer; model TFLOP/s (active experts, causal attention; recomputation not counted) and their share
of the machine's own product of two square matrices; the peak of allocated memory; and where the time of one profiled
step goes.
"""

# ruff: noqa: T201
import argparse
import json
import os
import statistics
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import _clone  # noqa: F401 - makes the imports below work

from megatron_mixtral import runtime  # noqa: E402

BACKEND = runtime.ready()  # before anything of the engine is imported
import step_candidates  # noqa: E402
import torch  # noqa: E402
from step_processes import DTYPES, Apart, Here, architecture  # noqa: E402

from megatron_mixtral.config import ParallelLayout  # noqa: E402

WARM_UP = 3  # rounds: until then the heap still grows
DEFAULTS = {"cuda": {"layers": 2, "sequence": 4096, "micro_batch": 2, "product": 8192, "dtype": "bf16"},
            "cpu": {"layers": 4, "sequence": 512, "micro_batch": 1, "product": 2048, "dtype": "fp32"}}


def parse(argv: list[str], device: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in DEFAULTS[device].items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="threads of torch on the CPU")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--same-heap", action="store_true", help="this library's heap settings for all candidates")
    parser.add_argument("--only", nargs="+", default=list(step_candidates.WHOLE), choices=list(step_candidates.MAKERS))
    parser.add_argument("--lora", action="store_true", help="adapters alone are trained: this library's and PEFT's")
    parser.add_argument("--qlora", action="store_true", help="the same over a base of 4 bits; with --lora both")
    parser.add_argument("--processor-time", action="store_true",
                        help="seconds of the processor, all threads together: on a CPU that others use too")
    parser.add_argument("--engine", nargs="*", default=[], metavar="FIELD=VALUE",
                        help="fields of the engine's configuration for `ours`, e.g. recompute_granularity=selective")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    if args.lora or args.qlora:
        args.only = [*["lora"] * args.lora, *["qlora"] * args.qlora, "peft"]
    return args


def product_rate(size: int, dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a product of two [size, size] matrices, the median of seven after a first."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    taken = []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(taken[1:])


def measure(candidates: dict[str, Here | Apart], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each candidate's forward + backward and of its whole step, taking turns."""
    found: dict[str, dict[str, list[float]]] = {name: {"forward_backward": [], "step": []} for name in candidates}
    for index in range(WARM_UP + rounds):
        for name, candidate in candidates.items():
            for kind, times in found[name].items():
                taken = candidate.ask(kind)
                if index >= WARM_UP:
                    times.append(taken)
    return found


def report(args: argparse.Namespace, device: str) -> dict[str, Any]:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    layout = ParallelLayout(tp=args.tp, ep=args.ep, world=world)
    candidates: dict[str, Here | Apart] = {}
    left_out = {}
    for name in args.only:
        try:
            candidates[name] = Here(name, args) if "RANK" in os.environ else Apart(name, args)
        except step_candidates.NotHere as reason:
            left_out[name] = str(reason)
    times = measure(candidates, args.rounds)
    tokens = args.micro_batch * args.sequence * layout.data_parallel
    flops = tokens * architecture(args, device).training_flops_per_token(args.sequence) / world
    rate = product_rate(args.product, DTYPES[args.dtype], device)
    rows = {}
    for name, candidate in candidates.items():
        both, step = (statistics.median(times[name][kind]) for kind in ("forward_backward", "step"))
        rows[name] = {
            "forward_backward_seconds": both, "step_seconds": step, "tokens_per_second": tokens / step,
            "forward_backward_tflops": flops / both / 1e12, "share_of_product": flops / both / rate,
            "peak_mib_over_parameters": candidate.ask("peak") / 2**20,
            "breakdown_ms": candidate.ask("breakdown"), "all_seconds": times[name]}
    return {"date": str(date.today()), "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "threads": torch.get_num_threads(), "world": world, "tp": args.tp, "ep": args.ep, "dtype": args.dtype,
            "layers": args.layers, "sequence": args.sequence, "micro_batch": args.micro_batch, "engine": args.engine,
            "same_heap": args.same_heap, "processor_time": args.processor_time,
            "versions": {name: version(name) for name in ("torch", "megatron-core", "transformers")},
            "product_tflops": rate / 1e12, "left_out": left_out, "candidates": rows}


def show(found: dict[str, Any]) -> None:
    print(f"{found['device']}, {found['threads']} threads, {found['world']} rank(s), {found['dtype']}, "
          f"{found['layers']} layers, {found['micro_batch']} x {found['sequence']} tokens; "
          f"square product {found['product_tflops']:.3f} TFLOP/s; {found['versions']}")
    rows = found["candidates"]
    base = next(iter(rows.values()))
    print(f"{'':14}{'fwd+bwd s':>10}{'step s':>9}{'tokens/s':>10}{'TFLOP/s':>9}{'of product':>11}{'peak MiB':>10}"
          f"{'fwd+bwd x':>11}{'step x':>8}")
    for name, row in rows.items():
        print(f"{name:14}{row['forward_backward_seconds']:10.3f}{row['step_seconds']:9.3f}"
              f"{row['tokens_per_second']:10.0f}{row['forward_backward_tflops']:9.3f}{row['share_of_product']:11.1%}"
              f"{row['peak_mib_over_parameters']:10.0f}"
              f"{row['forward_backward_seconds'] / base['forward_backward_seconds']:11.2f}"
              f"{row['step_seconds'] / base['step_seconds']:8.2f}")
    names = sorted({part for row in rows.values() for part in row["breakdown_ms"]})
    print(f"\n{'ms of a step':14}" + "".join(f"{name:>12}" for name in names))
    for name, row in rows.items():
        print(f"{name:14}" + "".join(f"{row['breakdown_ms'].get(part, 0.0):12.1f}" for part in names))
    for name, reason in found["left_out"].items():
        print(f"{name}: left out, {reason}")


def main(argv: list[str]) -> int:
    args = parse(argv, BACKEND.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if "RANK" in os.environ:
        step_candidates.initialize(BACKEND, args.tp, args.ep)
    found = report(args, BACKEND.device)
    if int(os.environ.get("RANK", "0")) == 0:
        show(found)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1))
    if "RANK" in os.environ:
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
