"""Adapters as files: in PEFT's forms, which base they belong to, new ones, and the 4-bit numbers of their bases."""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.weights.adapters import nf4
    from megatron_mixtral.weights.adapters.identity import FreshAdapters, fingerprint
    from megatron_mixtral.weights.adapters.peft_sink import FORMS, PeftSink
    from megatron_mixtral.weights.adapters.peft_source import PeftSource, names_in

__all__, __getattr__, __dir__ = door(__name__, __file__)
