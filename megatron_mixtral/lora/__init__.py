"""Low-rank adapters on every linear of a Mixtral, experts included, over a base of 16 or of 4 bits, in any layout.

    model = adapted(AdapterConfig.of(config, rank=64), engine, ...)
    fill(model, base, ..., places=base_places(model)); fill(model, adapters, ..., places=adapter_places(model))

Which tensors there are, their names and cuts, is in `weights/rules.py`: adapters are converted as weights are.
"""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.lora import cli
    from megatron_mixtral.lora.apply import AdaptedModel, adapted, adapter_places, base_places
    from megatron_mixtral.lora.guards import Guard
    from megatron_mixtral.lora.pretrained import from_pretrained

__all__, __getattr__, __dir__ = door(__name__, __file__)
