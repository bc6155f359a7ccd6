"""The CPU/gloo machine: stand-ins for what the engine asks of a GPU. `runtime.ready()` enables them."""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.runtime.cpu.gloo import lost_a_rank
    from megatron_mixtral.runtime.cpu.stand_ins import enable, enable_training

__all__, __getattr__, __dir__ = door(__name__, __file__)
