"""What the model is, what it is to the engine, and how it is laid out. Standard library only; imports no torch."""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.config import engine, hardware
    from megatron_mixtral.config.adapter import AdapterConfig
    from megatron_mixtral.config.layout import TARGET_FLAGS, Coord, ParallelLayout
    from megatron_mixtral.config.mixtral import CONFIG_FILE, MixtralConfig, preset, read_json

__all__, __getattr__, __dir__ = door(__name__, __file__)
