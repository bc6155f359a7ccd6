"""Documents cut into sentences, each a sequence of its own: `--split-sentences`, for models trained on sentence pairs.

The rule is that of Megatron-LM's tool: nltk's Punkt, on pieces of a million characters of the text. With
`--keep-newlines` the white space after a sentence stays with it, newlines included, but for that after closing quotes
and at the end of the text, which Punkt drops all the same; without, it drops all. Punkt's parameters are a file of its
own that nltk does not ship; it is never downloaded here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_mixtral.errors import ConfigError

LONGEST_PIECE = 1_000_000  # characters, as in Megatron-LM's tool

# Punkt looks for the end of a sentence where white space follows; here the white space becomes part of the sentence.
KEEPING_CONTEXT = r"""
    %(SentEndChars)s
    \s*
    (?=(?P<after_tok>
        %(NonWord)s
        |
        (?P<next_tok>\S+)
    ))"""


@dataclass(frozen=True)
class SentenceRule:
    """`--split-sentences` with `--lang` and `--keep-newlines`."""

    language: str = "english"
    keep_newlines: bool = False


def open_splitter(rule: SentenceRule) -> Callable[[str], list[str]]:
    """A function from a text to its sentences.

    Raises `ConfigError` when nltk is not installed or has no Punkt parameters for the language.
    """
    try:
        from nltk.tokenize import punkt
    except ImportError as error:
        raise ConfigError("--split-sentences needs the package nltk: pip install nltk.") from error
    try:
        tokenizer = punkt.PunktTokenizer(rule.language)
    except LookupError as error:
        raise ConfigError(
            f"--split-sentences: nltk finds no Punkt parameters for --lang {rule.language}. Unpack punkt_tab.zip of "
            f"nltk_data so that NLTK_DATA/tokenizers/punkt_tab/{rule.language} exists, and set NLTK_DATA."
        ) from error
    if rule.keep_newlines:

        class KeepingVars(punkt.PunktLanguageVars):
            _period_context_fmt = KEEPING_CONTEXT

        tokenizer = punkt.PunktSentenceTokenizer(train_text=tokenizer._params, lang_vars=KeepingVars())

    def split(text: str) -> list[str]:
        pieces = (text[start : start + LONGEST_PIECE] for start in range(0, len(text), LONGEST_PIECE))
        return [sentence for piece in pieces for sentence in tokenizer.tokenize(piece)]

    return split
