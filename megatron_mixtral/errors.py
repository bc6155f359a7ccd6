"""What a user can cause. Every message says what was expected, what was found, and the flag or file to change.

The command line tools catch `MixtralError`, print its message without a traceback and exit with status 1.
Broken invariants of our own stay `assert`s, with their traceback.
"""


class MixtralError(Exception):
    """Base of every error that a user can mend."""


class ConfigError(MixtralError):
    """A flag, a layout, a machine or a `config.json` that cannot work."""


class CheckpointError(MixtralError):
    """Weights that are missing, left over, of a wrong shape, or unreadable."""


class DataError(MixtralError):
    """A corpus, a tokenizer or a dataset that cannot be used as asked."""


class DivergedError(MixtralError):
    """Loss or gradient are not finite, step after step. Raised on the rank that writes the metrics."""


class RankLostError(MixtralError):
    """Another rank has ended, and this one cannot go on without it. Every rank that sees it says so."""


class CrashedError(MixtralError):
    """A rank ended with an error that nobody foresaw; a log file has its traceback."""
