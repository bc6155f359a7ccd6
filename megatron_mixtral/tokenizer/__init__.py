"""Text to ids, by the published tokenizers and by engines that give the same ids faster; conversations to ids and mask.

`tokenizer` reads a tokenizer, `encode` makes arrays of documents, `engines` do the work; `chat` renders conversations,
`prompts` those that a model is to answer, by its own template (`jinja_template`) where it has one; `limited` refuses
texts that cannot fit a context before it encodes them.
Nothing here needs torch or transformers.
"""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.tokenizer import chat
    from megatron_mixtral.tokenizer.encode import DocumentEncoder, special_tokens
    from megatron_mixtral.tokenizer.limited import LimitedTokenizer
    from megatron_mixtral.tokenizer.prompts import chat_prompts
    from megatron_mixtral.tokenizer.tokenizer import (
        TOKENIZER_TYPES,
        Tokenizer,
        load_tokenizer,
        mixtral_tokenizer_path,
        open_tokenizer,
    )

__all__, __getattr__, __dir__ = door(__name__, __file__)
