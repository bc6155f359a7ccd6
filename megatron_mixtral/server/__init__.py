"""An OpenAI-style server and a chat page on a generator, in any layout. docs/inference.md is the page.

Read in this order: `desk` (requests to the engine's steps and back), `requests` and `answers` (OpenAI's JSON, in and
out), `api` (the routes), `process` (a socket, signals, the end), `cli`. Needs the extra [serve].
"""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.server.cli import serve as serve_command
    from megatron_mixtral.server.process import open_socket, serve
    from megatron_mixtral.server.settings import Settings

__all__, __getattr__, __dir__ = door(__name__, __file__)
