"""Runs in the terminal: a table that is drawn again and again, or printed once where there is no terminal."""

import shutil
import time
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_mixtral.training.watch.run import WatchedRun

_BARS = "▁▂▃▄▅▆▇█"
_COLUMNS = (("lm_loss", "loss", "{:.4f}"), ("seconds_left", "left", ""),
            ("tokens_per_second_per_device", "TGS", "{:,.0f}"), ("grad_norm", "norm", "{:.3g}"),
            ("memory_bytes", "memory", ""), ("expert_imbalance_worst", "experts", "{:.2f}"))  # the first matter most


def show(runs: Sequence[WatchedRun], seconds: float | None, write: Any) -> None:
    """Write the table every so many seconds, each in the place of the last, until interrupted; None: once."""
    while True:
        for run in runs:
            run.update()
        lines = table([run.view() for run in runs], shutil.get_terminal_size().columns)
        if seconds is None:
            write("\n".join(lines) + "\n")
            return
        write("\033[H\033[2J" + "\n".join(lines) + "\n")  # home, clear
        time.sleep(seconds)


def table(views: Iterable[dict[str, Any]], width: int) -> list[str]:
    """Three lines a run and one an alert, each at most `width` characters."""
    lines = []
    for view in views:
        last = view["last"]
        lines.append(f"{view['name']}: {view['state']} ({view['words']})")
        figures = f"  step {last['iteration']}" if last else "  no step yet"
        for key, label, form in _COLUMNS:
            figure = f"  {label} {_figure(key, last[key], form)}" if key in last else ""
            figures += figure if len(figures) + len(figure) <= width else ""  # half a number is a wrong number
        lines += [figures, "  " + spark(view["curves"]["lm_loss"], max(10, width - 4))]
        lines += [f"  ! {alert}" for alert in view["alerts"]]
    return [line[:width] for line in lines]


def spark(values: Sequence[float | None], width: int) -> str:
    """A curve of at most `width` characters, the last values at the right; a step that is not finite is an x."""
    shown = values[::max(1, -(-len(values) // width))]
    finite = [value for value in shown if value is not None]
    if not finite:
        return "x" * len(shown)
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join("x" if value is None else _BARS[int((value - low) / span * (len(_BARS) - 1))] for value in shown)


def _figure(key: str, value: Any, form: str) -> str:
    if value is None:
        return "not finite"
    if key == "memory_bytes":
        return f"{value / 2**30:.1f} GiB"
    if key == "seconds_left":
        return f"{int(value) // 3600}:{int(value) // 60 % 60:02d}:{int(value) % 60:02d}"
    return form.format(value)
