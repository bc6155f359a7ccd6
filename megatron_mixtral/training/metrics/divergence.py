"""Steps whose loss or gradient is not finite: counted, and a run of them ends training with the samples they read.

The engine skips such a step (`runtime/engine_fixes/nonfinite.py`); `StepWriter` asks here, once a step on
the last rank.
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

    def count(self, metrics: Mapping[str, Any], samples: range) -> None:
        """One step's metrics, and the samples of its global batch: positions in the training set's order."""
        wrong = {name: metrics[name] for name in ("lm_loss", "grad_norm")
                 if name in metrics and not math.isfinite(metrics[name])}
        if not wrong:
            self._samples = []
            return
        self.skipped += 1
        self._samples.append(samples)
        logger.warning("step %s is skipped and the weights stay as they were: %s; it read samples %d to %d of the "
                       "training set", metrics["iteration"],
                       ", ".join(f"{name} {value}" for name, value in wrong.items()), samples.start, samples.stop - 1)

    def check(self) -> None:
        """`DivergedError` after `limit` skipped steps in a row."""
        if self._limit is None or len(self._samples) < self._limit:
            return
        raise DivergedError(
            f"{len(self._samples)} steps in a row had a loss or gradient that is not finite (--max-nan-steps "
            f"{self._limit}); they read samples {self._samples[0].start} to {self._samples[-1].stop - 1} of the "
            "training set. Look at these samples, lower --lr or --clip-grad, or start from an earlier checkpoint "
            "(--ckpt-step)")
