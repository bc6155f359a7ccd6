"""The throughput of a run, averaged over its steps, from whatever the run wrote. `training/cli.py` prints it.

Read are our `metrics.jsonl`, the output of the training program, and XTuner's log. The averages are tokens per second
and device (TGS):

- mean: of the steps' own rates, as published figures of XTuner are made. Fast steps count as much as slow ones, so it
  is never below the next, and far above it where steps differ (arithmetic against harmonic mean).
- time-weighted mean: each step weighted by its seconds, which is all tokens / all time. This is the throughput.
- median: of the steps' own rates; a few disturbed steps do not move it.
"""

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mixtral.errors import DataError

EDGE = 5  # steps at either end that are left out where no range is given: warm-up, and the last save
SMOOTH = 10  # steps whose mean is compared with a target loss

_OURS = re.compile(r"step (?P<step>\d+)(?:/\d+)? \|(?: (?:lm )?loss (?P<loss>[\d.]+) \|)?.*?(?P<rate>[\d.]+) "
                   r"tokens/s/device.*?\| (?P<seconds>[\d.]+) s\b")
_XTUNER = re.compile(r"Iter\(train\) \[\s*(?P<step>\d+)/\d+\].*?\btime: (?P<seconds>[\d.]+)"
                     r"(?:.*?\bloss: (?P<loss>[\d.]+))?.*?tokens_per_sec: (?P<rate>[\d.]+)")


@dataclass(frozen=True)
class Step:
    """One step: tokens per second and device, its seconds, and its loss where it was logged and finite."""

    rate: float
    seconds: float
    loss: float | None = None


@dataclass(frozen=True)
class Averages:
    """Tokens per second and device over the steps from `first` to `last`, of which `steps` were logged."""

    first: int
    last: int
    steps: int
    mean: float
    time_weighted_mean: float
    median: float

    def __str__(self) -> str:
        return (f"steps {self.first} to {self.last}, {self.steps} logged, tokens/s/device:\n"
                f"mean                {self.mean:.2f}\n"
                f"time-weighted mean  {self.time_weighted_mean:.2f}\n"
                f"median              {self.median:.2f}")


def read(path: Path) -> dict[int, Step]:
    """The steps of a log by number; of a step that a resumed run took again, the last. `DataError` if there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    steps = dict(found for found in map(_step_of, lines) if found is not None)
    if not steps:
        raise DataError(f"{path}: no line has the throughput of a step; expected a metrics.jsonl, the output of "
                        "tools/pretrain_mixtral.py, or a log of XTuner with tokens_per_sec")
    return steps


def _step_of(line: str) -> tuple[int, Step] | None:
    if line.startswith("{"):
        try:
            metrics = json.loads(line)
            rate, seconds = metrics["tokens_per_second_per_device"], metrics["step_seconds"]
            return metrics["iteration"], Step(rate, seconds, metrics.get("lm_loss"))
        except (ValueError, KeyError):  # a line that a killed run left unfinished, or another program's
            return None
    found = _OURS.search(line) or _XTUNER.search(line)
    if found is None:
        return None
    loss = None if found["loss"] is None else float(found["loss"])
    return int(found["step"]), Step(float(found["rate"]), float(found["seconds"]), loss)


def average(steps: dict[int, Step], first: int | None = None, last: int | None = None) -> Averages:
    """Over the steps with first <= number <= last; without these all but `EDGE` at either end, or all of a log that is
    too short for that. `DataError` if none.
    """
    numbers = sorted(steps)
    edge = EDGE if len(numbers) > 2 * EDGE else 0
    first, last = numbers[edge] if first is None else first, numbers[-1 - edge] if last is None else last
    chosen = [steps[number] for number in numbers if first <= number <= last]
    if not chosen:
        raise DataError(f"no step from {first} to {last}: the log has {len(numbers)} steps, from {numbers[0]} to "
                        f"{numbers[-1]}; give START and END of these, or none")
    return Averages(first, last, len(chosen), statistics.fmean(step.rate for step in chosen), time_weighted(chosen),
                    statistics.median(step.rate for step in chosen))


def reached(steps: dict[int, Step], target: float) -> str:
    """The first step at which the loss, as the mean of the last `SMOOTH` steps, was at or below `target`, in words.
    `DataError` where the log has no losses.
    """
    losses = [(number, steps[number].loss) for number in sorted(steps) if steps[number].loss is not None]
    if not losses:
        raise DataError("no line of the log has a loss, which --target-loss is about")
    means = [(losses[at][0], statistics.fmean(loss for _, loss in losses[max(0, at + 1 - SMOOTH):at + 1]))
             for at in range(min(SMOOTH, len(losses)) - 1, len(losses))]
    found = next(((number, mean) for number, mean in means if mean <= target), None)
    if found is not None:
        return f"loss at or below {target:g}: step {found[0]} (mean of the last {SMOOTH} steps {found[1]:.4f})"
    number, lowest = min(means, key=lambda one: one[1])
    return (f"loss at or below {target:g}: not reached; the lowest mean of {SMOOTH} steps is {lowest:.4f}, "
            f"at step {number}")


def time_weighted(steps: Sequence[Step]) -> float:
    """All tokens / all time."""
    return sum(step.rate * step.seconds for step in steps) / sum(step.seconds for step in steps)


def names_of(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ."""
    parts = [path.absolute().parts for path in paths]
    length = next((n for n in range(1, max(map(len, parts))) if len({p[-n:] for p in parts}) == len(parts)), 1)
    return ["/".join(p[-length:]) for p in parts]
