"""One run as its folder shows it: the metrics of its steps so far, whether it goes on, and what ought to be looked
at.

Nothing is asked of the run itself. Its metrics file is read as it grows; whether the run is alive is known by the lease
that it holds on its folder while it lives.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import DataError
from megatron_mixtral.training.checkpoints import lease

SERIES = ("lm_loss", "grad_norm", "learning_rate", "tokens_per_second_per_device", "memory_bytes", "expert_imbalance",
          "expert_imbalance_worst")  # fmt: skip
_POINTS = 800  # of a curve; more than a screen has columns
_RECENT = 20  # steps
_SLOW, _UNEVEN, _RISEN = 2.0, 4.0, 1.0  # x the median step; x the average expert; nats above the lowest


class WatchedRun:
    """`update()` reads what was added; the rest are views of it. `DataError` where there is no metrics file."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self._metrics = path / "metrics.jsonl" if path.is_dir() else path
        self._steps: dict[int, dict[str, Any]] = {}
        self._read, self._rest = 0, b""
        self._beats, self._beat_at = b"", 0.0
        if not self._metrics.is_file():
            raise DataError(f"{self._metrics} is not there: expected the folder of a run (--save), which has it from "
                            "the first step on, or a metrics file")

    def update(self) -> None:
        """Read the lines that were added. A step that was taken again counts as it was taken last; the steps that a
        resumed run dropped, because it began before them, go.
        """
        if self._metrics.stat().st_size < self._read:  # another run's, under the same name
            self._steps, self._read, self._rest = {}, 0, b""
        with self._metrics.open("rb") as file:
            file.seek(self._read)
            added = file.read()
        self._read += len(added)
        *lines, self._rest = (self._rest + added).split(b"\n")
        for line in lines:
            try:
                step = json.loads(line)
                number = int(step["iteration"])
            except (ValueError, KeyError, TypeError):
                continue  # the cut line of a run that was killed, with the next run's first behind it
            for later in [one for one in reversed(self._steps) if one >= number]:
                del self._steps[later]
            self._steps[number] = step

    @property
    def last(self) -> dict[str, Any]:
        """The metrics of the last step; empty before the first."""
        return self._steps[max(self._steps)] if self._steps else {}

    def state(self, clock: Callable[[], float] = time.monotonic) -> tuple[str, str]:
        """(One of running, finished, stopped, died; the reason in words). `clock`: seconds."""
        seen = lease.look(self._metrics.parent)
        if seen is None:
            if self.last.get("seconds_left") == 0:
                return "finished", "all of its steps are done"
            return "stopped", "before its last step, by a signal or an error (without --save nobody can tell)"
        if seen.beats != self._beats:
            self._beats, self._beat_at = seen.beats, clock()
        alive = clock() - self._beat_at < lease.STILL if seen.alive is None else seen.alive
        return ("running", seen.words) if alive else ("died", f"{seen.words} was killed, or its machine is gone")

    def alerts(self, now: Callable[[], float] = time.time) -> list[str]:
        """What ought to worry somebody, in words."""
        recent = [self._steps[number] for number in sorted(self._steps)[-_RECENT:]]
        found = []
        bad = [step["iteration"] for step in recent if "lm_loss" in step and step["lm_loss"] is None]
        if bad:
            found.append(f"diverging: {len(bad)} of the last {len(recent)} steps are not finite, the last is {bad[-1]}")
        losses = [step["lm_loss"] for step in self._steps.values() if step.get("lm_loss") is not None]
        lowest = min(_medians(losses), default=None)
        if lowest is not None and (risen := statistics.median(losses[-_RECENT:]) - lowest) > _RISEN:
            found.append(f"diverging: the loss is {risen:.2f} above its lowest")
        uneven = [step["expert_imbalance_worst"] for step in recent if step.get("expert_imbalance_worst")]
        if uneven and (much := statistics.median(uneven)) > _UNEVEN:
            layer = recent[-1].get("expert_imbalance_worst_layer")
            found.append(f"experts: the busiest of layer {layer} has {much:.1f} times the average's tokens")
        seconds = [step["step_seconds"] for step in recent if step.get("step_seconds")]
        if len(seconds) > 4 and seconds[-1] > _SLOW * statistics.median(seconds):
            found.append(f"slow: the last step took {seconds[-1] / statistics.median(seconds):.1f} times the usual")
        if seconds and self.state()[0] == "running":
            quiet = now() - self._metrics.stat().st_mtime
            if quiet > max(60.0, 10 * statistics.median(seconds)):
                found.append(f"quiet: no step for {quiet / 60:.0f} minutes")
        return found

    def view(self) -> dict[str, Any]:
        """All that the page shows, as JSON: state, last step, alerts, and curves of at most some hundred points."""
        state, words = self.state()
        numbers = sorted(self._steps)
        every = max(1, len(numbers) // _POINTS)
        shown = numbers[::every] if numbers[-1:] == numbers[::every][-1:] else [*numbers[::every], numbers[-1]]
        curves = {key: [self._steps[number].get(key) for number in shown] for key in SERIES}
        return {"name": self.name, "state": state, "words": words, "last": self.last, "alerts": self.alerts(),
                "steps": shown, "curves": curves}  # fmt: skip


def _medians(values: list[float]) -> list[float]:
    """Medians of neighbouring `_RECENT` values, one after the other."""
    return [statistics.median(values[at:at + _RECENT]) for at in range(0, len(values) - _RECENT + 1, _RECENT)]
