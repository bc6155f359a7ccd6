"""The corpus on disk: which files there are, how they are cut, and their records.

`files` lists and cuts, `readers` reads lines and rows, `records` parses a line, `objects` reads instruction data.
"""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.data.corpus.files import Chunk, cut_chunks, list_inputs, natural_key
    from megatron_mixtral.data.corpus.objects import read_objects
    from megatron_mixtral.data.corpus.readers import LineCounts, lines_before, read_records
    from megatron_mixtral.data.corpus.records import BadRecord, parse_object

__all__, __getattr__, __dir__ = door(__name__, __file__)
