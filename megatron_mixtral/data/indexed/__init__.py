"""Indexed data sets, the engine's `.bin/.idx` pairs: written, read, merged and inspected with numpy alone."""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.data.indexed.inspection import check_tokenizer, inspect, samples, tokenizer_of
    from megatron_mixtral.data.indexed.merging import merge
    from megatron_mixtral.data.indexed.reader import IndexFile
    from megatron_mixtral.data.indexed.writer import IndexedWriter, PartSize, whole_parts

__all__, __getattr__, __dir__ = door(__name__, __file__)
