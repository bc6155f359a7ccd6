"""A picture of evaluations: the accuracy of every task or subject as a dot, with its standard error, a colour a model.

`cli.plot` calls `draw` with what `evaluate` wrote as `results.json`, or lm-eval as its own. Needs the extra `plot`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.evaluation.mmlu import CATEGORIES, CATEGORY_OF
from megatron_mixtral.evaluation.report import accuracy_of

try:
    from matplotlib.figure import Figure
except ImportError:
    raise ConfigError('pictures need matplotlib: pip install "megatron-mixtral[plot]"') from None

COLOURS = ("#1f5fa8", "#c8501e", "#2e8b57", "#7a4fa3", "#b8860b", "#c2185b", "#00838f", "#5d4037")
MARKS = "oDs^v<>P"
GREY, LIGHT = "#777777", "#e6e6e6"
_CHANCE = 0.25  # of four letters

Found = dict[str, tuple[float, float]]  # task: accuracy, standard error (0: not known)


def figures_of(whole: Mapping[str, Any], where: str) -> Found:
    """Accuracy and standard error of every task and group of a `results.json`. `DataError` where there is none."""
    found = {}
    for name, results in (whole.get("groups", {}) | whole.get("results", {})).items():
        try:
            key = accuracy_of(results)
        except IndexError:
            continue  # a group without a figure of its own
        if not 0 <= results[key] <= 1:
            continue  # no share of right answers
        metric, rule = key.split(",")
        error = results.get(f"{metric}_stderr,{rule}")
        found[name] = float(results[key]), float(error) if isinstance(error, int | float) else 0.0
    if not found:
        raise DataError(f"{where} holds no figure: expected results.json of an evaluation, in lm-eval's form")
    return found


def rows_of(runs: Sequence[tuple[str, Found]]) -> list[tuple[str, str | None]]:
    """(label, task; None for a heading) from top to bottom: MMLU by category, in each the best subject of the first run
    first; then all other tasks.
    """
    first, known = runs[0][1], [name for _, found in runs for name in found]

    def value(name: str) -> float:
        return -first[name][0] if name in first else 1.0

    rows: list[tuple[str, str | None]] = [("MMLU", "mmlu")] if "mmlu" in known else []
    used = {"mmlu"} | {f"mmlu_{one}" for one in CATEGORIES}
    for category in CATEGORIES:
        subjects = {name for name in known if CATEGORY_OF.get(name.removeprefix("mmlu_")) == category}
        if subjects:
            title = category.replace("_", " ").replace("stem", "STEM")
            rows.append((title, f"mmlu_{category}" if f"mmlu_{category}" in known else None))
            rows += [("    " + name.removeprefix("mmlu_").replace("_", " "), name)
                     for name in sorted(subjects, key=lambda one: (value(one), one))]
            used |= subjects
    return rows + [(name, name) for name in dict.fromkeys(known) if name not in used]


def draw(runs: Sequence[tuple[str, Found]], output: Path) -> None:
    """Write the picture. `runs` are (label, figures), the first one's above the others'. `ConfigError` for a name whose
    ending is no kind of pictures.
    """
    rows = rows_of(runs)
    figure = Figure(figsize=(8.5, 1.6 + 0.21 * len(rows)), dpi=120, layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    if output.suffix.lower().removeprefix(".") not in kinds:
        raise ConfigError(f"--output {output}: expected a name that ends in one of .{', .'.join(sorted(kinds))}")
    axes = figure.subplots()
    places = {name: -number for number, (_, name) in enumerate(rows) if name is not None}
    for name, place in places.items():
        values = [found[name][0] for _, found in runs if name in found]
        axes.plot([min(values), max(values)], [place, place], color=GREY, linewidth=1, zorder=1)
    for number, (label, found) in reversed([*enumerate(runs)]):
        shown = [name for name in places if name in found]
        whole = f": {100 * found['mmlu'][0]:.1f} % of MMLU" if "mmlu" in found else ""
        axes.errorbar([found[name][0] for name in shown], [places[name] for name in shown],
                      xerr=[found[name][1] for name in shown], fmt=MARKS[number % len(MARKS)], markersize=5,
                      color=COLOURS[number % len(COLOURS)], markerfacecolor=None if number == 0 else "white",
                      elinewidth=1, linestyle="none", label=label + whole, zorder=3 if number == 0 else 2)
    if any(name.removeprefix("mmlu_") in CATEGORY_OF for name in places):
        axes.axvline(_CHANCE, color=GREY, linewidth=1, linestyle=":", zorder=0)
        axes.annotate("chance", (_CHANCE, 1), xycoords=("data", "axes fraction"), xytext=(2, 2),
                      textcoords="offset points", fontsize=7, color=GREY)
    axes.set_yticks([-number for number in range(len(rows))], [label for label, _ in rows], fontsize=8)
    for text, (label, _) in zip(axes.get_yticklabels(), rows, strict=True):
        text.set_fontweight("normal" if label.startswith("    ") else "bold")
    axes.set_ylim(0.8 - len(rows), 0.8)
    axes.set_xlabel("share of right answers, and its standard error")
    axes.grid(axis="both", color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], frameon=False, loc="outside upper left", ncols=2, fontsize=9)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
