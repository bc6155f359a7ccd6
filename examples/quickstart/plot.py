"""The loss curve of a run as a picture, from the figures that the training program writes.

    python examples/quickstart/plot.py --metrics RUN/metrics.jsonl --output loss.png [--mark 30]
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402

BLUE, GREY = "#1f5fa8", "#777777"


def read(path: Path) -> list[dict[str, float]]:
    """One record a step. A step that was done twice, before and after a stop, counts as it was done last."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [record for _, record in sorted({record["iteration"]: record for record in records}.items())]


def draw(records: list[dict[str, float]], vocabulary: int, mark: int | None, output: Path) -> None:
    """Loss over steps on the left axis, the learning rate behind it on the right one."""
    steps = [record["iteration"] for record in records]
    losses = [record["lm_loss"] for record in records]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    rate = axes.twinx()
    rate.fill_between(steps, [record["learning_rate"] for record in records], color=GREY, alpha=0.12, linewidth=0)
    rate.set_ylabel("learning rate", color=GREY)
    rate.tick_params(axis="y", colors=GREY)
    rate.set_ylim(bottom=0)
    axes.set_zorder(rate.get_zorder() + 1)  # the curve before the shade
    axes.patch.set_visible(False)
    chance = math.log(vocabulary)
    axes.axhline(chance, color=GREY, linestyle="--", linewidth=1)
    axes.annotate(f"ln {vocabulary:,} = {chance:.2f}: every token equally likely", (steps[-1], chance), (0, -4),
                  textcoords="offset points", ha="right", va="top", color=GREY, fontsize=9)
    axes.plot(steps, losses, color=BLUE, linewidth=2, marker="o", markersize=3)
    axes.annotate(f"{losses[-1]:.2f}", (steps[-1], losses[-1]), (0, 8), textcoords="offset points", ha="right",
                  color=BLUE, fontweight="bold")
    if mark is not None and steps[0] <= mark < steps[-1]:
        axes.axvline(mark + 0.5, color=GREY, linestyle=":", linewidth=1)
        axes.annotate("stopped, resumed", (mark + 0.5, axes.get_ylim()[0]), (4, 6), textcoords="offset points",
                      color=GREY, fontsize=9)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("language model loss (nats per token)")
    tokens = records[-1].get("consumed_samples", 0)
    axes.set_title(f"Mixtral, {len(steps)} steps, {tokens:,.0f} samples", loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
        rate.spines[side].set_visible(False)
    figure.savefig(output)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the loss curve of a run.")
    parser.add_argument("--metrics", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--mark", type=int, help="last step before the run was stopped")
    flags = parser.parse_args(argv)
    records = read(flags.metrics)
    if not records:
        sys.exit(f"error: {flags.metrics} holds no step")
    draw(records, flags.vocabulary, flags.mark, flags.output)
    print(f"{flags.output}: {len(records)} steps, loss {records[0]['lm_loss']:.2f} -> {records[-1]['lm_loss']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
