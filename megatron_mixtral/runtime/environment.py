"""Start-up: bring machine and engine into the state in which everything above this room can run."""

import functools
import logging
import os
from typing import TYPE_CHECKING, Any

from megatron_mixtral.runtime.replacements import Replacements, apply

if TYPE_CHECKING:
    from megatron_mixtral.runtime.backend import Backend

logger = logging.getLogger(__name__)


def ready(training: bool = False) -> "Backend":
    """Detect the machine, repair the engine, and stand in for CUDA where no GPU is visible. Call before any engine
    object is made; a second call returns the first one's answer. With `training` also ready `megatron.training`.
    Returns the `Backend`; `ConfigError` where more local processes than GPUs were started.
    """
    if training:
        _ready_training()
    return _ready_core()[0]


@functools.cache
def _ready_core() -> tuple["Backend", Replacements]:
    """The machine, and what was replaced on it."""
    from megatron_mixtral.runtime.backend import detect

    local = os.environ.get("LOCAL_WORLD_SIZE")
    backend = detect(int(local) if local else None)
    replacements = Replacements()
    if backend.device == "cpu":
        from megatron_mixtral.runtime.cpu import enable

        enable(replacements)
    from megatron_mixtral.runtime.engine_fixes import FIXES

    applied = apply(replacements, FIXES)
    logger.info("running on %s (%s), collectives %s, layers %s, engine repairs: %s", backend.device, backend.reason,
                backend.collectives, backend.transformer_impl, ", ".join(applied) or "none")
    return backend, replacements


@functools.cache
def _ready_training() -> None:
    from megatron_mixtral.runtime.cpu import enable_training
    from megatron_mixtral.runtime.engine_fixes import TRAINING_FIXES

    backend, replacements = _ready_core()
    if backend.device == "cpu":
        enable_training(replacements)
    apply(replacements, TRAINING_FIXES)


def lead_checkpoints_through(manager: Any) -> None:
    """Let `manager` (training/checkpoints/manager.py) decide about the directories of the engine's checkpoints and
    about failures. Call after `ready(training=True)`.
    """
    from megatron_mixtral.runtime import saving

    saving.lead_through(_ready_core()[1], manager)
