"""Mixtral as an engine model: `build(...)` gives a `MixtralModel`, one pipeline stage (or model chunk) of it.

Call `megatron_mixtral.runtime.ready()` before building.
"""

from megatron_mixtral.model.builder import MixtralModel, build, check_config, transformer_config
from megatron_mixtral.model.spec import block_spec

__all__ = ["MixtralModel", "block_spec", "build", "check_config", "transformer_config"]
