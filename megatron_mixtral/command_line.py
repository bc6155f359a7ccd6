"""The parser of every command, and what of the libraries' words a user sees.

The parser is argparse's, and a flag that it does not have names its neighbours.

argparse complains of a flag that is missing before it looks at those that it does not know, so a misspelt `--input`
would only be asked for. Python 3.14 has `suggest_on_error`, for choices alone.
"""

import argparse
import difflib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn


def hush_libraries() -> None:
    """Keep from the screen what torch and the engine tell their developers (absent packages, deprecations): fifty lines
    a rank around an answer of one. Errors come through, and `python -W default` or PYTHONWARNINGS brings it all back.
    """
    if sys.warnoptions:
        return
    warnings.simplefilter("ignore")
    for name in ("megatron", "torch.utils.cpp_extension"):  # torch sets the level of "torch" when it is imported
        logging.getLogger(name).setLevel(logging.ERROR)


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that knows its flags' neighbours. With `flags_only` a command ends when it has read its
    flags: scripts ask so before they start many ranks.
    """

    flags_only = False
    _words: Sequence[str] = ()

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse does it; the words are kept, for `error`."""
        self._words = args or ()
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse does it; see `flags_only`."""
        found = super().parse_args(args, namespace)
        if self.flags_only:
            self.exit()
        return found

    def error(self, message: str) -> NoReturn:
        """End with status 2 and a message that also says of each unknown flag which one may be meant."""
        super().error("; ".join([message, *self._misspelt()]))

    def flags(self) -> list[str]:
        """Every flag, in each of its spellings."""
        return [flag for flag in self._option_string_actions if flag.startswith("--")]

    def switch(self, flag: str) -> dict[bool, list[str]] | None:
        """What says yes and what says no to a flag that takes no value (nothing, where it has no --no-...); None for
        one that takes a value.
        """
        action, off = self._option_string_actions[flag], f"--no-{flag.removeprefix('--')}"
        paired = self._option_string_actions.get(off) is action
        return None if action.nargs != 0 else {True: [flag], False: [off] if paired else []}

    def neighbours(self, word: str) -> str:
        """The end of a sentence on a flag that is not known: "; is it --input?", or nothing where none is near."""
        flag = word.partition("=")[0].replace("_", "-")
        near = difflib.get_close_matches(flag, self.flags(), 3) if flag.startswith("-") else ()
        return f"; is it {' or '.join(near)}?" if near else ""

    def _misspelt(self) -> Iterator[str]:
        for word in self._words:
            if word == "--":
                return
            flag, known = word.partition("=")[0], self.flags()
            if flag.startswith("--") and not any(one == flag or self.allow_abbrev and one.startswith(flag)
                                                 for one in known):
                yield f"there is no {flag}{self.neighbours(flag)}"
