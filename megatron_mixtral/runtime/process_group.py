"""The default process group: that of torchrun's ranks, or of one process by itself.

torchrun (torch 2.13) keeps one store over all restarts. In it the ranks of a new start find, under the same keys, where
those of the last start were listening: they try to connect to processes that are gone, or wait for ever. Here the keys
of each start have a prefix of their own. Remove when torch's rendezvous asks for TORCHELASTIC_RESTART_COUNT again.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_mixtral.runtime.backend import Backend

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun


def join_process_group(backend: "Backend") -> int:
    """Initialise torch.distributed where it is not; the number of ranks. One process by itself needs no address."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        if all(name in os.environ for name in _RANK_VARIABLES):
            if backend.device == "cuda":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
            store = store_of_this_start()
            dist.init_process_group(backend.collectives, store=store, init_method="env://" if store is None else None,
                                    rank=rank, world_size=world)
        else:
            dist.init_process_group(backend.collectives, store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_world_size()


def store_of_this_start() -> Any:
    """The store to initialise torch.distributed with; None, the default, unless torchrun has restarted the ranks.

    torchrun counts restarts on each node. On several nodes with a dynamic rendezvous (`--rdzv-backend c10d`) the counts
    may differ, and `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` has it make a new store each time; nothing is to do then.
    """
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if restart == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import PrefixStore, TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["WORLD_SIZE"]),
                     is_master=False)
    return PrefixStore(f"restart_{restart}", store)
