"""The figures of each optimizer step: one line in the log, one JSON object in `metrics.jsonl`.

The engine hands each step's own values to its TensorBoard writer; `StepWriter` stands in that place on the last rank
(and passes everything on to a real TensorBoard writer, if one was asked for). Throughput counts all tokens of the
global batch over the whole step: every micro-batch, the optimizer and the communication, but not saving and evaluation.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from megatron_mixtral.config import MixtralConfig

logger = logging.getLogger(__name__)

# The engine's names of its scalars -> ours.
_NAMES = {"lm loss": "lm_loss", "load_balancing_loss": "aux_loss", "z_loss": "z_loss", "grad-norm": "grad_norm",
          "learning-rate": "learning_rate", "loss-scale": "loss_scale"}


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
    """Collects one step's scalars; `finish_step` writes them, after the engine has handed over the last one."""

    def __init__(self, config: MixtralConfig, *, seq_length: int, global_batch_size: Callable[[], int], devices: int,
                 train_iters: int | None, lap: Callable[[int], float], consumed_samples: Callable[[], int],
                 path: Path | None = None, inner: Any = None) -> None:
        """`lap(iteration)` gives the step's seconds (`StepClock.lap`), `inner` is a TensorBoard writer or None."""
        self._flops = config.training_flops_per_token(seq_length)
        self._seq_length, self._devices, self._train_iters = seq_length, devices, train_iters
        self._global_batch_size, self._lap, self._consumed_samples = global_batch_size, lap, consumed_samples
        self._inner = inner
        self._file: TextIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
        self._iteration, self._seconds = 0, 0.0
        self._values: dict[str, float] = {}

    def add_scalar(self, name: str, value: Any, iteration: int) -> None:
        """One scalar from the engine; the names written against samples instead of steps are left to TensorBoard."""
        if self._inner is not None:
            self._inner.add_scalar(name, value, iteration)
        if name in _NAMES:
            if iteration != self._iteration:
                self._iteration, self._seconds = iteration, self._lap(iteration)
            self._values[_NAMES[name]] = float(value)

    def add_text(self, *args: Any, **kwargs: Any) -> None:
        """The run's arguments, for TensorBoard."""
        if self._inner is not None:
            self._inner.add_text(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Whatever else TensorBoard's writer has (histograms, flush, close)."""
        if self._inner is None:
            return lambda *args, **kwargs: None
        return getattr(self._inner, name)

    def finish_step(self) -> dict[str, Any]:
        """Write the step's line and return its figures; called once after the engine has logged the step."""
        values, self._values = self._values, {}
        tokens = self._global_batch_size() * self._seq_length
        seconds = max(self._seconds, 1e-9)
        rate = tokens / seconds / self._devices
        figures = {"iteration": self._iteration, "consumed_samples": self._consumed_samples(), **values,
                   "step_seconds": seconds, "tokens_per_second_per_device": rate,
                   "model_tflops_per_device": rate * self._flops / 1e12}
        if self._file is not None:
            self._file.write(json.dumps(figures) + "\n")
            self._file.flush()
        logger.info("%s", self._line(figures))
        return figures

    def _line(self, figures: dict[str, Any]) -> str:
        parts = [f"step {figures['iteration']}" + (f"/{self._train_iters}" if self._train_iters else "")]
        for key, label, form in (("lm_loss", "lm loss", ".4f"), ("aux_loss", "aux loss", ".4f"),
                                 ("z_loss", "z loss", ".4g"), ("grad_norm", "grad norm", ".4f"),
                                 ("learning_rate", "lr", ".3e")):
            if key in figures:
                parts.append(f"{label} {figures[key]:{form}}")
        parts += [f"{figures['tokens_per_second_per_device']:.1f} tokens/s/device",
                  f"{figures['model_tflops_per_device']:.4g} TFLOP/s/device", f"{figures['step_seconds']:.3f} s"]
        return " | ".join(parts)
