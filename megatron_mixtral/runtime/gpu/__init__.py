"""What only a GPU computes: products into the gradient buffer, groups by the faster of two ways, moves of tokens."""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.runtime.gpu.permutation import FIX as PERMUTATION
    from megatron_mixtral.runtime.gpu.products import FIX as WEIGHT_GRADIENTS
    from megatron_mixtral.runtime.gpu.products import add_product, fastest, group_ends, groups_are_fast, has_flash
    from megatron_mixtral.runtime.gpu.rotation import FIX as ROTATION

__all__, __getattr__, __dir__ = door(__name__, __file__)
