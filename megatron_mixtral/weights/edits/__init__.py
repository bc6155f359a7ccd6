"""Other models out of given ones, as sources that change what they read: any sink writes them."""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.weights.edits.dense import DenseSource
    from megatron_mixtral.weights.edits.merge_lora import MergedSource
    from megatron_mixtral.weights.edits.select_experts import SelectedExperts, busiest
    from megatron_mixtral.weights.edits.upcycle import UpcycledSource

__all__, __getattr__, __dir__ = door(__name__, __file__)
