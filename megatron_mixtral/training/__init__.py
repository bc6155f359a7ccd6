"""The training program on `megatron.training`: `pretrain.run(argv)`. Importing this package imports no torch."""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.training.cli import build_index_cache as build_index_cache_command
    from megatron_mixtral.training.cli import calc as calc_command
    from megatron_mixtral.training.cli import plot as plot_command
    from megatron_mixtral.training.cli import pretrain as pretrain_command

__all__, __getattr__, __dir__ = door(__name__, __file__)
