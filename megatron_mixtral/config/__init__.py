"""What the model is and how it is laid out: frozen dataclasses of the standard library. Imports no torch."""

from megatron_mixtral.config.layout import TARGET_FLAGS, TRAINING_FLAGS, Coord, ParallelLayout
from megatron_mixtral.config.mixtral import CONFIG_FILE, PRESETS, MixtralConfig, preset, read_json

__all__ = ["CONFIG_FILE", "PRESETS", "TARGET_FLAGS", "TRAINING_FLAGS", "Coord", "MixtralConfig", "ParallelLayout",
           "preset", "read_json"]
