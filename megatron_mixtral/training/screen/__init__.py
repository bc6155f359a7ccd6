"""What of a run comes to the screen, and the files that have all of it. Imports no torch."""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.training.screen.lines import WIDTH
    from megatron_mixtral.training.screen.output import Output
    from megatron_mixtral.training.screen.summary import summary
__all__, __getattr__, __dir__ = door(__name__, __file__)
