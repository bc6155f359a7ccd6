"""The checkpoints of a run: whole directories under their names, sums, removal, export, going on."""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.training.checkpoints import directory, integrity, lease
    from megatron_mixtral.training.checkpoints.lease import Lease
    from megatron_mixtral.training.checkpoints.manager import CheckpointManager
__all__, __getattr__, __dir__ = door(__name__, __file__)
