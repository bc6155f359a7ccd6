"""Plain text to indexed data sets for pretraining: `preprocess_text` runs it, `TextOptions` says what is wanted."""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.data.text.options import TextOptions
    from megatron_mixtral.data.text.run import preprocess_text
    from megatron_mixtral.data.text.workers import BATCH_CHARACTERS

__all__, __getattr__, __dir__ = door(__name__, __file__)
