"""What only a CPU computes, in as few passes over memory as torch's kernels allow. GPUs have the engine's own."""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.model.cpu.embedding import WordEmbedding
    from megatron_mixtral.model.cpu.few_rows import linear_of_few
    from megatron_mixtral.model.cpu.swiglu import WeightedSwiGLU, weighted_swiglu

__all__, __getattr__, __dir__ = door(__name__, __file__)
