"""Pictures of runs from what they wrote: loss, throughput, load of the experts. `training/cli.py` calls `draw`.

Several runs are drawn over one another, each in a colour that it keeps in all pictures. Only this module imports
matplotlib (the extra `plot`).
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.training.metrics.throughput import Step, names_of, time_weighted

try:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
except ImportError:
    raise ConfigError('pictures need matplotlib: pip install "megatron-mixtral[plot]"') from None

COLOURS = ("#1f5fa8", "#c8501e", "#2e8b57", "#7a4fa3", "#b8860b", "#c2185b", "#00838f", "#5d4037")
GREY = "#777777"
_RECENT = 20  # steps whose load of each expert is shown, and whose median smooths a curve
_MANY = 60  # steps above which a curve is smoothed


@dataclass(frozen=True)
class RunMetrics:
    """What one run wrote: the metrics of its steps, and the tokens of each expert of each layer in its last steps."""

    name: str
    steps: list[dict[str, Any]]  # in order, each once
    expert_tokens: list[list[int]] | None  # [layers][experts], summed; None without --log-expert-load

    def column(self, key: str, unit: float = 1.0) -> tuple[list[int], list[float]]:
        """(steps, values in `unit`) of one metric, where it was written and finite."""
        written = [step for step in self.steps if step.get(key) is not None]
        return [step["iteration"] for step in written], [step[key] / unit for step in written]


def read_run(path: Path, name: str) -> RunMetrics:
    """A run's folder, or its metrics file. Steps that were taken twice count as they were taken last. `DataError`."""
    metrics = path / "metrics.jsonl" if path.is_dir() else path
    steps = {line["iteration"]: line for line in _lines(metrics)}
    if not steps:
        raise DataError(f"{metrics}: it holds no step; expected what a run writes there, one JSON object a step")
    load = metrics.with_name("expert_load.jsonl")
    tokens = None
    if load.is_file():
        by_step = {line["iteration"]: line["expert_load"] for line in _lines(load)}
        recent = [by_step[step] for step in sorted(by_step)[-_RECENT:]]
        tokens = [[sum(cell) for cell in zip(*rows, strict=True)] for rows in zip(*recent, strict=True)] or None
    return RunMetrics(name, [steps[step] for step in sorted(steps)], tokens)


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; expected the folder of a run (--save) or its "
                        "metrics file") from None
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            value = json.loads(line)
            found.append({**value, "iteration": int(value["iteration"])})
        except (ValueError, KeyError, TypeError):
            if number < len(text.splitlines()):  # the last line may have been cut by the end of the run
                raise DataError(f"{path}, line {number}: expected the JSON object of a step") from None
    return found


def draw(paths: Sequence[Path], output: Path) -> list[Path]:
    """Write loss.png, throughput.png and expert_load.png into `output`; returns their paths."""
    runs = [read_run(path, name) for path, name in zip(paths, names_of(paths), strict=True)]
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in (("loss", loss(runs)), ("throughput", throughput(runs)), ("expert_load", expert_load(runs))):
        path = output / f"{name}.png"
        figure.savefig(path)
        written.append(path)
    return written


# -- the pictures ----------------------------------------------------------------------------------------


def loss(runs: Sequence[RunMetrics]) -> Figure:
    """Language-model loss, and below it the balancing loss and the gradient norm."""
    figure = Figure(figsize=(9, 8), dpi=120, layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    _curves(top, runs, "lm_loss", "language model loss (nats per token)")
    _curves(middle, runs, "aux_loss", "balancing loss")
    _curves(bottom, runs, "grad_norm", "gradient norm")
    ends = [_smooth(run.column("lm_loss")[1])[-1:] for run in runs]
    labels = [f"{run.name}: {end[0]:.3f} nats at the end" if end else run.name
              for run, end in zip(runs, ends, strict=True)]
    _dress(top, bottom, "Loss", labels)
    return figure


def throughput(runs: Sequence[RunMetrics]) -> Figure:
    """Tokens per second and device of each step with the run's own (all tokens / all time), and the memory."""
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _curves(top, runs, "tokens_per_second_per_device", "tokens / s / device")
    labels = []
    for number, run in enumerate(runs):
        whole = time_weighted([Step(step["tokens_per_second_per_device"], step["step_seconds"]) for step in run.steps])
        top.axhline(whole, color=_colour(number), linestyle="--", linewidth=1)
        labels.append(f"{run.name}: {whole:,.1f} tokens / s / device")
    _curves(bottom, runs, "memory_bytes", "memory of the\nfullest device (GiB)", unit=2**30)
    for axes in (top, bottom):
        axes.set_ylim(bottom=0, top=1.08 * axes.get_ylim()[1])  # a level line is not to lie on the border
    _dress(top, bottom, "Throughput (dashed: all tokens / all time)", labels)
    return figure


def expert_load(runs: Sequence[RunMetrics]) -> Figure:
    """The busiest expert against the average one over the steps; below, each expert of each layer in the last steps."""
    mapped = [run for run in runs if run.expert_tokens is not None]
    rows = max((0.2 * len(run.expert_tokens) + 0.8 for run in mapped), default=0)
    figure = Figure(figsize=(max(9, 4.5 * len(mapped)), 4 + rows), dpi=120, layout="constrained")
    grid = figure.add_gridspec(2 if mapped else 1, max(len(mapped), 1), height_ratios=(4, rows) if mapped else None)
    top = figure.add_subplot(grid[0, :])
    _curves(top, runs, "expert_imbalance", "busiest / average expert")
    for number, run in enumerate(runs):
        steps, worst = run.column("expert_imbalance_worst")
        top.plot(steps, _smooth(worst), color=_colour(number), linewidth=1, linestyle=":")
    top.axhline(1, color=GREY, linewidth=1)
    _dress(top, top, "Load of the experts (mean over the layers; dotted: the worst layer; 1: balanced)",
           [run.name for run in runs])
    places = [figure.add_subplot(grid[1, column]) for column in range(len(mapped))]
    shown = [_load_map(place, run) for place, run in zip(places, mapped, strict=True)]
    if shown:
        figure.colorbar(shown[0], ax=places, pad=0.01, label="tokens / average")
    return figure


def _load_map(axes: Any, run: RunMetrics) -> Any:
    """Tokens of each expert of each layer, as a multiple of the average; returns the image, for its scale."""
    relative = [[count * len(layer) / max(sum(layer), 1) for count in layer] for layer in run.expert_tokens]
    shown = axes.imshow(relative, cmap=colormaps["RdBu_r"], vmin=0, vmax=2, aspect="auto")
    if len(relative) <= 16:
        for layer, row in enumerate(relative):
            for expert, value in enumerate(row):
                dark = abs(value - 1) > 0.6
                axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=7,
                          color="white" if dark else "black")
    axes.set_xticks(range(len(relative[0])))
    axes.set_yticks(range(0, len(relative), 1 if len(relative) <= 16 else 4))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(f"{run.name}, last {min(_RECENT, len(run.steps))} steps", loc="left", fontsize=10)
    return shown


# -- their parts -----------------------------------------------------------------------------------------


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _smooth(values: Sequence[float]) -> list[float]:
    """The median of the `_RECENT` values around each, where there are many; else the values."""
    if len(values) <= _MANY:
        return list(values)
    half = _RECENT // 2
    return [statistics.median(values[max(0, at - half):at + half + 1]) for at in range(len(values))]


def _curves(axes: Any, runs: Sequence[RunMetrics], key: str, label: str, unit: float = 1.0) -> None:
    """One curve a run; of long runs also every step, faintly."""
    for number, run in enumerate(runs):
        steps, values = run.column(key, unit)
        smooth = _smooth(values)
        if smooth != values:
            axes.plot(steps, values, color=_colour(number), linewidth=0.8, alpha=0.25)
        axes.plot(steps, smooth, color=_colour(number), linewidth=1.8, label=run.name,
                  marker="o" if len(steps) < 2 else None)
    axes.set_ylabel(label)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _dress(top: Any, bottom: Any, title: str, labels: Sequence[str]) -> None:
    """Title and legend on top: the runs, in the order in which their curves were drawn first."""
    top.set_title(title, loc="left", fontweight="bold")
    bottom.set_xlabel("optimizer step")
    curves = [line for line in top.get_lines() if not line.get_label().startswith("_")]
    top.legend(curves, labels, frameon=False, loc="best")
