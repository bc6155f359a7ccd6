"""The three formats of a Mixtral's weights: Hugging Face, rank directories, distributed checkpoints."""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.weights.formats import directory
    from megatron_mixtral.weights.formats.dist_sink import DistSink
    from megatron_mixtral.weights.formats.dist_source import DistSource
    from megatron_mixtral.weights.formats.hf_sink import HFSink
    from megatron_mixtral.weights.formats.hf_source import HFSource
    from megatron_mixtral.weights.formats.rank_sink import RankDirSink
    from megatron_mixtral.weights.formats.rank_source import RankDirSource
    from megatron_mixtral.weights.formats.saved_args import saved_arguments

__all__, __getattr__, __dir__ = door(__name__, __file__)
