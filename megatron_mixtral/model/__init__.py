"""Mixtral as an engine model: `from_pretrained(directory)` gives a ready one, in one process or under torchrun.

Below it: `initialize(layout)` readies machine, process groups and engine; `build(...)` makes one pipeline stage (or
model chunk) of a model; `fill(...)` gives it the weights of any source.
"""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.model import experts, spec
    from megatron_mixtral.model.builder import MixtralModel, build, transformer_config
    from megatron_mixtral.model.plain import PlainLayers
    from megatron_mixtral.model.pretrained import fill, from_pretrained, initialize, type_name

__all__, __getattr__, __dir__ = door(__name__, __file__)
