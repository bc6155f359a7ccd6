"""What the ranks of a run know of one another: which is slow, and which stands still."""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.training.ranks.life import SignsOfLife
    from megatron_mixtral.training.ranks.seconds import RankSeconds
__all__, __getattr__, __dir__ = door(__name__, __file__)
