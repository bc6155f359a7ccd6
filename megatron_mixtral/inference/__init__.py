"""Text from a trained Mixtral: in Python (`Generator`), and as the `generate` command. docs/inference.md is the page.

Read in this order: `parameters` (what a request may ask for), `engine` (requests to tokens, in lockstep on all ranks),
`lockstep` (what they tell one another), `cache` and `stage` (keys and values of what was read, and one packed pass over
the model), `sampling`, `continuation` (tokens to text, and when it ends), `scoring` (how probable given tokens are),
`generator`, `cli`.
"""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.inference import chat, cli
    from megatron_mixtral.inference.engine import Engine
    from megatron_mixtral.inference.generator import Completion, Generator
    from megatron_mixtral.inference.parameters import Event, SamplingParams, ScoringParams, TokenLogprobs

__all__, __getattr__, __dir__ = door(__name__, __file__)
