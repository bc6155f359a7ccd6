#!/usr/bin/env python3
"""Whether a run that was stopped and resumed is one run: each step once, in order, all losses finite and falling.

    python benchmarks/gpu/check_run.py SAVE/metrics.jsonl --steps 40 --json run.json
"""

# ruff: noqa: T201
import argparse
import json
import math
import sys
from pathlib import Path
from statistics import fmean, median
from typing import Any


def check(lines: list[dict[str, Any]], steps: int) -> tuple[dict[str, Any], list[str]]:
    """(figures, what is wrong)."""
    found = [line["iteration"] for line in lines]
    losses = [line["lm_loss"] for line in lines]
    wrong = []
    if found != list(range(1, steps + 1)):
        wrong.append(f"expected steps 1 to {steps}, found {found}")
    if not all(isinstance(loss, float) and math.isfinite(loss) for loss in losses):
        wrong.append(f"losses that are not finite: {losses}")
    elif len(losses) < 8 or not fmean(losses[-4:]) < fmean(losses[:4]):
        wrong.append(f"the loss does not fall: {losses}")
    rates = [line["tokens_per_second_per_device"] for line in lines if line.get("tokens_per_second_per_device")]
    return {"steps": len(found), "losses": losses, "tokens_per_second": median(rates) if rates else None}, wrong


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    figures, wrong = check([json.loads(line) for line in args.metrics.read_text().splitlines()], args.steps)
    if args.json:
        args.json.write_text(json.dumps({**figures, "wrong": wrong}, indent=1))
    print(f"{figures['steps']} steps, loss {figures['losses'][:1]} to {figures['losses'][-1:]}, "
          f"{figures['tokens_per_second']} tokens/s a device")
    for sentence in wrong:
        print(sentence)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
