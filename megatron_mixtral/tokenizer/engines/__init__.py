"""Engines of encoding: programs that give the same ids. The fastest one is chosen, and proved, at the start of a run.

`base.py` says what an engine is, `choose.py` picks one; `native.py` (our C++ extension, tables by `bpe_tables.py`) and
`libraries.py` are the engines. `tokenizer/encode.py` calls them.
"""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.tokenizer.engines import native
    from megatron_mixtral.tokenizer.engines.base import Engine, SpecialTokens, frame, token_dtype
    from megatron_mixtral.tokenizer.engines.choose import ENGINES, EngineChoice, choose_engine, make_engine
    from megatron_mixtral.tokenizer.engines.libraries import ReferenceEngine

__all__, __getattr__, __dir__ = door(__name__, __file__)
