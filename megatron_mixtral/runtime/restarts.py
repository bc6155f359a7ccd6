"""Starting again under torchrun: ranks must not meet the addresses of the ranks that died.

torchrun (torch 2.13) keeps one store over all restarts. In it the ranks of a new start find, under the same keys, where
those of the last start were listening: they try to connect to processes that are gone, or wait for ever. Here the keys
of each start have a prefix of their own. Remove when torch's rendezvous asks for TORCHELASTIC_RESTART_COUNT again.
"""

import os
from typing import Any


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
