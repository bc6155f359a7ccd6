"""A chat in the terminal: the `chat` command. `terminal` reads lines and Ctrl-C, `cli` keeps the conversation."""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.inference.chat.cli import Conversation, chat
    from megatron_mixtral.inference.chat.terminal import Interrupt, Lines

__all__, __getattr__, __dir__ = door(__name__, __file__)
