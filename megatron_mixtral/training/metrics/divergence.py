"""Steps whose loss or gradient is not finite: counted, and a run of them ends training with the samples they read.

The engine skips such a step (`runtime/engine_fixes/nonfinite.py`); in fp16 its loss scaler does, and halves the scale
for the next one, which is how it finds the largest that fits. `StepWriter` asks here, once a step on the last rank.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

from megatron_mixtral.errors import DivergedError

logger = logging.getLogger(__name__)


class Divergence:
    """Counts skipped steps. `limit` of them in a row raise `DivergedError`; None never does."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._samples: list[range] = []  # of the present run of skipped steps
        self.skipped = 0  # since the program started

    def count(self, metrics: Mapping[str, Any], samples: range, skipped: bool = False, may_fall: bool = False) -> None:
        """One step's metrics, and the samples of its global batch: positions in the training set's order; whether the
        engine skipped it, and whether the loss scale may fall further. While it may, an overflow is only counted.
        """
        wrong = {name: metrics[name] for name in ("lm_loss", "grad_norm")
                 if name in metrics and not math.isfinite(metrics[name])}
        if not wrong and not skipped:
            self._samples = []
            return
        self.skipped += 1
        if wrong or not may_fall:
            self._samples.append(samples)
        cause = ", ".join(f"{name} {value}" for name, value in wrong.items())
        if not wrong:
            cause = f"its scaled gradients overflow; the loss scale is now {metrics['loss_scale']:g}"
            cause += "" if may_fall else " and cannot fall further"
        logger.warning("step %s is skipped and the weights stay as they were: %s; it read samples %d to %d of the "
                       "training set", metrics["iteration"], cause, samples.start, samples.stop - 1)

    def check(self) -> None:
        """`DivergedError` after `limit` skipped steps in a row."""
        if self._limit is None or len(self._samples) < self._limit:
            return
        raise DivergedError(
            f"{len(self._samples)} steps in a row had a loss or gradient that is not finite (--max-nan-steps "
            f"{self._limit}); they read samples {self._samples[0].start} to {self._samples[-1].stop - 1} of the "
            "training set. Look at these samples, lower --lr or --clip-grad, or start from an earlier checkpoint "
            "(--ckpt-step)")
