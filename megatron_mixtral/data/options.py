"""What every preprocessing run is told; `text/options.py` and `instruction/options.py` add what one kind is told."""

import os
from dataclasses import dataclass

from megatron_mixtral.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """What both kinds of run are told. `chunk_bytes` bounds the input that a worker takes at a time.

    Raises `ConfigError` for values that cannot work, as both kinds do.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer_path: str
    tokenizer_type: str = "HuggingFaceTokenizer"
    append_eod: bool = False
    prepend_bod: bool = False
    workers: int = 1
    on_error: str = "stop"
    log_interval: int = 1000
    chunk_bytes: int = 4 << 20

    @property
    def skip_bad(self) -> bool:
        """Whether bad records are left out and counted, instead of ending the run."""
        return self.on_error == "skip"

    def __post_init__(self) -> None:
        if not os.path.basename(self.output_prefix):
            raise ConfigError(f"--output-prefix {self.output_prefix!r} must end in a name, such as DIR/common_crawl.")
        if self.workers < 1 or self.log_interval < 1 or self.chunk_bytes < 1:
            raise ConfigError("--workers and --log-interval must be at least 1.")
        if self.on_error not in ("stop", "skip"):
            raise ConfigError(f"--on-error {self.on_error} is neither stop nor skip.")
