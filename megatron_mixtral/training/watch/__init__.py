"""Watching runs while they go on, and after: what each says of itself in its folder, on a page or in the terminal."""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.training.watch.page import serve
    from megatron_mixtral.training.watch.run import WatchedRun
    from megatron_mixtral.training.watch.terminal import show
__all__, __getattr__, __dir__ = door(__name__, __file__)
