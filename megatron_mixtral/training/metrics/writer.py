"""The metrics of each optimizer step: one line in the log, one JSON object in `metrics.jsonl`, TensorBoard, W&B.

The engine hands each step's own values to its TensorBoard writer; `StepWriter` stands in that place on the last rank
(`training/metrics/hooks.py` puts it there). Throughput counts all tokens of the global batch over the whole step: every
micro-batch, the optimizer and the communication, but not saving and evaluation. docs/training.md defines every metric.
"""

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from megatron_mixtral.training.metrics.divergence import Divergence
from megatron_mixtral.training.metrics.expert_load import Imbalance
from megatron_mixtral.training.screen import WIDTH

logger = logging.getLogger(__name__)

# The engine's names of its scalars -> ours.
_NAMES = {"lm loss": "lm_loss", "load_balancing_loss": "aux_loss", "seq_load_balancing_loss": "aux_loss",
          "global_load_balancing_loss": "aux_loss", "z_loss": "z_loss", "grad-norm": "grad_norm",
          "learning-rate": "learning_rate", "loss-scale": "loss_scale"}
# Ours that the engine does not hand to TensorBoard and W&B itself.
_OWN = ("step_seconds", "data_seconds", "samples_per_second", "tokens_per_second", "tokens_per_second_per_device",
        "model_tflops_per_device", "mfu", "memory_bytes", "expert_imbalance", "expert_imbalance_worst")
_LINE = (("lm_loss", "lm loss {:.4f}"), ("aux_loss", "aux loss {:.4f}"), ("z_loss", "z loss {:.4g}"),
         ("grad_norm", "grad norm {:.4f}"), ("loss_scale", "loss scale {:g}"), ("learning_rate", "lr {:.3e}"),
         ("tokens_per_second_per_device", "TGS {:.1f} tokens/s/device"),
         ("model_tflops_per_device", "{:.4g} TFLOP/s/device"), ("mfu", "MFU {:.1%}"))
# On the screen, those first that matter most; what does not fit is in the rank's log.
_SHORT = (("lm_loss", "loss {:.4f}"), ("tokens_per_second_per_device", "{:.1f} tokens/s/device"),
          ("seconds_left", "{} left"), ("step_seconds", "{:.3f} s"), ("loss_scale", "scale {:g}"),
          ("grad_norm", "grad {:.3f}"), ("learning_rate", "lr {:.1e}"), ("mfu", "MFU {:.1%}"),
          ("expert_imbalance", "load {:.2f}"))
_RECENT = 50  # steps whose median predicts the time left


@dataclass(frozen=True)
class RunFacts:
    """What the metrics of a step need to know about the run; none of it changes."""

    flops_per_token: int  # forward and backward, `MixtralConfig.training_flops_per_token`
    seq_length: int
    devices: int
    peak_tflops: float | None  # of one device; None where it is not known: no MFU then
    smallest_loss_scale: float | None = None  # None where the loss is not scaled


class StepClock:
    """Seconds of each training step, from the engine's `interval-time` timer, which rests while saving and evaluating.

    The engine resets the timer whenever it prints its own line, every `log_interval` steps.
    """

    def __init__(self, timer: Any, log_interval: int) -> None:
        self._timer, self._log_interval, self._last = timer, log_interval, 0.0

    def lap(self, iteration: int) -> float:
        """Seconds since the last lap; called once a step, before the engine prints its line."""
        now = self._timer.elapsed(reset=False)
        seconds = now - self._last
        self._last = 0.0 if iteration % self._log_interval == 0 else now
        return seconds


class StepWriter:
    """Collects one step's values; `finish_step` writes them, after the engine has handed over the last one."""

    def __init__(self, facts: RunFacts, *, lap: Callable[[int], float], global_batch_size: Callable[[], int],
                 train_iters: Callable[[], int | None], consumed_samples: Callable[[], int], path: Path | None = None,
                 load_path: Path | None = None, tensorboard: Any = None, tensorboard_interval: int = 1,
                 wandb: Any = None, max_nan_steps: int | None = None) -> None:
        """`lap(iteration)` gives the step's seconds (`StepClock.lap`). The metrics go to `path`, the tokens of each
        expert to `load_path`; `tensorboard` is a writer and gets every `tensorboard_interval`th step, `wandb` the
        module or a run, which the engine made. `max_nan_steps` ends the run (`divergence.py`).
        """
        self._divergence = Divergence(max_nan_steps)
        self._facts, self._lap, self._global_batch_size = facts, lap, global_batch_size
        self._train_iters, self._consumed_samples = train_iters, consumed_samples
        self._tensorboard, self._tensorboard_interval, self._wandb = tensorboard, tensorboard_interval, wandb
        self._file, self._load_file = _appending(path), _appending(load_path)
        self._iteration, self._seconds = 0, 0.0
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._values: dict[str, Any] = {}
        self._figures: dict[str, float] = {}
        self._expert_tokens: list[list[int]] = []

    def add_scalar(self, name: str, value: Any, iteration: int) -> None:
        """One scalar from the engine; `name vs samples` has the samples instead of the step as its `iteration`."""
        if name in _NAMES:
            if iteration != self._iteration:
                self._iteration, self._seconds = iteration, self._lap(iteration)
            if _NAMES[name] != "aux_loss" or value != 0:  # the engine reports 0 where the coefficient is 0
                self._values[_NAMES[name]] = float(value)
        if name.startswith("lm loss validation") and not name.endswith((" ppl", " samples")):
            which = name.removeprefix("lm loss validation").strip("-")
            logger.info("evaluation after step %d | loss %.6f%s", iteration, value, which and f" | of {which}")
        every_step = name.removesuffix(" vs samples") in _NAMES  # others come when there is something to tell
        if self._tensorboard is not None and not (every_step and self._iteration % self._tensorboard_interval):
            self._tensorboard.add_scalar(name, value, iteration)

    def __getattr__(self, name: str) -> Any:
        """Whatever else TensorBoard's writer has (the run's arguments as text, histograms, flush, close)."""
        if self._tensorboard is None:
            return lambda *args, **kwargs: None
        return getattr(self._tensorboard, name)

    def observe(self, *, expert_tokens: list[list[int]], memory_bytes: int, data_seconds: float,
                of_ranks: Mapping[str, Any] = {}) -> None:  # noqa: B006 - it is only read
        """What the ranks put together in a step: tokens [layers][experts], the memory of the fullest rank, how long
        the rank waited for data that waited longest, and `RankSeconds.collect`.
        """
        load = Imbalance.of(expert_tokens)
        self._expert_tokens = expert_tokens
        self._values.update(memory_bytes=memory_bytes, data_seconds=data_seconds, expert_imbalance=load.mean,
                            expert_imbalance_worst=load.worst, expert_imbalance_worst_layer=load.worst_layer,
                            **of_ranks)

    def evaluated(self, figures: dict[str, float]) -> None:
        """Figures of questions that were asked after this step; TensorBoard has them already."""
        self._values.update(figures)
        self._figures = figures

    def finish_step(self, skipped: bool = False, loss_scale: float = 1.0) -> dict[str, Any]:
        """Write the step's line and return its metrics; called once after the engine has logged the step, with whether
        it skipped the step, and the scale of the next one's loss.

        `DivergedError` after too many steps that are not finite.
        """
        smallest = self._facts.smallest_loss_scale
        self._values["loss_scale"] = loss_scale
        metrics = self._metrics()
        consumed = metrics["consumed_samples"]
        self._divergence.count(metrics, range(consumed - self._global_batch_size(), consumed), skipped,
                               may_fall=smallest is not None and loss_scale > smallest)
        metrics["skipped_steps"] = self._divergence.skipped
        if self._file is not None:
            _write_line(self._file, metrics)
        if self._load_file is not None:
            _write_line(self._load_file, {"iteration": self._iteration, "expert_load": self._expert_tokens})
        self._chart(metrics)
        shown = metrics if smallest is not None else {**metrics, "loss_scale": None}
        last = self._train_iters()
        logger.info("%s", _line(shown, last), extra={
            "shown": _short(shown, last, _SHORT), "status": _short(shown, last, _SHORT[:3]), "last": last,
            "step": self._iteration})
        self._values, self._figures, self._expert_tokens = {}, {}, []
        self._divergence.check()
        return metrics

    def _metrics(self) -> dict[str, Any]:
        facts, seconds = self._facts, max(self._seconds, 1e-9)
        tokens = self._global_batch_size() * facts.seq_length
        rate = tokens / seconds
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        metrics = {"iteration": self._iteration, "time": now, "consumed_samples": self._consumed_samples(),
                   **self._values, "tokens": tokens, "step_seconds": seconds,
                   "samples_per_second": self._global_batch_size() / seconds, "tokens_per_second": rate,
                   "tokens_per_second_per_device": rate / facts.devices,
                   "model_tflops_per_device": rate / facts.devices * facts.flops_per_token / 1e12}
        if facts.peak_tflops is not None:
            metrics["mfu"] = metrics["model_tflops_per_device"] / facts.peak_tflops
        last = self._train_iters()
        self._recent.append(seconds)
        if last is not None:
            metrics["seconds_left"] = statistics.median(self._recent) * max(last - self._iteration, 0)
        return metrics

    def _chart(self, metrics: dict[str, Any]) -> None:
        """Our metrics for TensorBoard and W&B, in the engine's style of names."""
        charted = {name.replace("_", "-"): metrics[name] for name in _OWN if name in metrics}
        if self._load_file is not None:
            charted |= {f"expert-imbalance/layer-{layer}": Imbalance.of([tokens]).worst
                        for layer, tokens in enumerate(self._expert_tokens)}
        if self._wandb is not None:
            self._wandb.log(charted | self._figures, self._iteration)
        if self._tensorboard is not None and self._iteration % self._tensorboard_interval == 0:
            for name, value in charted.items():
                self._tensorboard.add_scalar(name, value, self._iteration)


def _appending(path: Path | None) -> TextIO | None:
    if path is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a", encoding="utf-8")


def _write_line(file: TextIO, value: dict[str, Any]) -> None:
    """One JSON object; what is not finite is null, because JSON has no name for it. A full disk does not end the run:
    the line stays in the file's buffer, and the next one writes both.
    """
    finite = {name: None if isinstance(one, float) and not math.isfinite(one) else one for name, one in value.items()}
    try:
        file.write(json.dumps(finite, allow_nan=False) + "\n")
        file.flush()
    except OSError as error:
        logger.warning("%s cannot be written now: %s", file.name, error)


def _short(metrics: dict[str, Any], last: int | None, parts: tuple[tuple[str, str], ...]) -> str:
    """The step's line on the screen: as many of `parts` as fit into its width, in their order."""
    line = f"step {metrics['iteration']}" + (f"/{last}" if last else "")
    for name, form in parts:
        if metrics.get(name) is None:
            continue
        value = _hours(metrics[name]) if name == "seconds_left" else metrics[name]
        if len(line) + len(part := f" | {form.format(value)}") > WIDTH:
            break
        line += part
    return line


def _hours(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _line(metrics: dict[str, Any], last: int | None) -> str:
    """The step's line in the log."""
    parts = [f"step {metrics['iteration']}" + (f"/{last}" if last else "")]
    parts += [form.format(metrics[name]) for name, form in _LINE if metrics.get(name) is not None]
    if "memory_bytes" in metrics:
        parts.append(f"memory {metrics['memory_bytes'] / 2**30:.2f} GiB")
        parts.append("expert load {expert_imbalance:.2f} (layer {expert_imbalance_worst_layer}: "
                     "{expert_imbalance_worst:.2f})".format(**metrics))
    parts.append(f"{metrics['step_seconds']:.3f} s")
    if "slowest_rank" in metrics:
        work = metrics["rank_work_seconds"]
        parts.append(f"slowest rank {metrics['slowest_rank']} on {metrics['slowest_node']}: {max(work):.3f} s of its "
                     f"own, the median {statistics.median(work):.3f} s")
    if "seconds_left" in metrics:
        parts.append(f"{_hours(metrics['seconds_left'])} left")
    return " | ".join(parts)
