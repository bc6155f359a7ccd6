"""Where each number of a Mixtral lives: one rule table, and sources and sinks that all speak it.

    from megatron_mixtral.weights import convert, open_sink, open_source
    convert(open_source("Mixtral-8x7B"), open_sink("ranks", "torch", ParallelLayout(tp=2)))

Read in this order: `rules` (ten rules), `plan` (what one shard holds), `protocols` (what sources and sinks say to each
other), `formats` (the three formats), `streaming` (how bytes move), `conversion` (from any source to any sink), `cli`.

Nothing here needs torch to move a weight; only a cast imports it.
"""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.weights import cli
    from megatron_mixtral.weights.conversion import convert
    from megatron_mixtral.weights.formats import directory, saved_arguments
    from megatron_mixtral.weights.opening import open_sink, open_source
    from megatron_mixtral.weights.plan import ShardPlan
    from megatron_mixtral.weights.rules import hf_tensors
    from megatron_mixtral.weights.streaming import assemble

__all__, __getattr__, __dir__ = door(__name__, __file__)
