"""Whole runs on `megatron.training`: the training program, its checkpoints and its metrics.

Importing this package imports no torch.
"""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.training.cli import calc as calc_command
    from megatron_mixtral.training.cli import plot as plot_command
    from megatron_mixtral.training.cli import watch as watch_command
    from megatron_mixtral.training.micro_batch import masked_sum
    from megatron_mixtral.training.pretrain import build_index_cache as build_index_cache_command
    from megatron_mixtral.training.pretrain import run as pretrain_command
    from megatron_mixtral.training.recipes import finetune as finetune_command
    from megatron_mixtral.training.recipes import recipes as recipes_command
__all__, __getattr__, __dir__ = door(__name__, __file__)
