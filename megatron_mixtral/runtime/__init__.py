"""The only room that knows the machine or alters the engine. Nothing happens at import: call `ready()` once.

    backend = runtime.ready()      # detect, apply the repairs, stand in for CUDA where there is none
"""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.runtime.backend import current_device, device_memory, memory_used, peak_tflops
    from megatron_mixtral.runtime.cpu import lost_a_rank
    from megatron_mixtral.runtime.environment import lead_checkpoints_through, ready, set_variables
    from megatron_mixtral.runtime.process_group import join_process_group, store_of_this_start

__all__, __getattr__, __dir__ = door(__name__, __file__)
