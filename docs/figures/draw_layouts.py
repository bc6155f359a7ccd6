"""Draws how a Mixtral lies over ranks, from `ParallelLayout` itself: the pictures of docs/parallelism.md.

    python docs/figures/draw_layouts.py

One picture a layout: a row for each pipeline stage, a box for each rank with its layers, its share of the dense weights
and its experts. Boxes of one colour hold the same dense weights; experts of one colour are the same experts.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from megatron_mixtral.config import MixtralConfig, ParallelLayout, preset

FOLDER = Path(__file__).resolve().parent
LAYOUTS = {
    "tp2-pp2-ep2": ParallelLayout(tp=2, pp=2, ep=2, world=8),
    "tp2-ep4-etp1": ParallelLayout(tp=2, ep=4, etp=1, world=8),
    "pp4-vpp2-ep2": ParallelLayout(pp=4, vpp=2, ep=2, world=8),
}
DENSE, EXPERTS = plt.get_cmap("Pastel1"), plt.get_cmap("Set2")


def numbers(values: range) -> str:
    return f"{values[0]}" if len(values) == 1 else f"{values[0]}-{values[-1]}"


def draw(layout: ParallelLayout, model: MixtralConfig, path: Path) -> None:
    """One picture; rows are pipeline stages, columns the ranks of a stage in their order."""
    columns = layout.world // layout.pp
    figure, axes = plt.subplots(figsize=(2.1 * columns + 0.9, 1.75 * layout.pp + 0.7))
    for rank in range(layout.world):
        coord = layout.coord_of(rank)
        x, y = 2.1 * (rank % columns), -1.75 * coord.pp
        replica = rank % columns // (layout.tp * layout.cp)
        layers = " + ".join(numbers(layout.layers_of(coord.pp, model.num_hidden_layers, chunk))
                            for chunk in range(layout.vpp))
        box(axes, x, y + 0.62, 0.85, DENSE(coord.tp),
            f"rank {rank}\nlayers {layers}\ndense slice {coord.tp + 1}/{layout.tp}, replica {replica}")
        share = "" if layout.etp == 1 else f"\nslice {coord.etp + 1}/{layout.etp}"
        experts = numbers(layout.experts_of(coord.ep, model.num_local_experts))
        box(axes, x, y, 0.55, EXPERTS(coord.ep), f"experts {experts}{share}")
    for stage in range(layout.pp):
        axes.text(-0.15, -1.75 * stage + 0.73, f"stage {stage}", rotation=90, va="center", ha="right", fontsize=10)
    axes.set_xlim(-0.6, 2.1 * columns)
    axes.set_ylim(-1.75 * (layout.pp - 1) - 0.15, 1.6)
    axes.set_axis_off()
    axes.set_title(f"{layout} on {layout.world} ranks, data parallel {layout.data_parallel}", fontsize=11)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def box(axes: plt.Axes, x: float, y: float, height: float, colour: tuple[float, ...], text: str) -> None:
    axes.add_patch(FancyBboxPatch((x, y), 1.9, height, boxstyle="round,pad=0.02", facecolor=colour, edgecolor="0.4"))
    axes.text(x + 0.95, y + height / 2, text, ha="center", va="center", fontsize=8.5)


def main() -> int:
    for name, layout in LAYOUTS.items():
        draw(layout.validate(preset("mixtral-8x7b")), preset("mixtral-8x7b"), FOLDER / f"layout-{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
