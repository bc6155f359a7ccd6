"""What a server is told; `docs/inference.md` explains the flags. Standard library only."""

import math
from dataclasses import dataclass

from megatron_mixtral.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """One server's settings. `ConfigError` for a limit that cannot be."""

    model: str  # the name under which the model is asked for
    adapter: str | None = None  # and the name with its adapters, where it has some
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_queue: int = 256  # continuations that may wait for a slot
    max_body: int = 2**20  # bytes
    request_timeout: float = 600.0  # seconds

    @property
    def names(self) -> tuple[str, ...]:
        """All names that may be asked for; the first is meant where none is given."""
        return (self.model,) if self.adapter is None else (self.model, self.adapter)

    def __post_init__(self) -> None:
        if self.adapter == self.model:
            raise ConfigError(f"the model and its adapters are both called {self.model!r}: give another "
                              "--served-adapter-name, or --served-model-name")
        for flag, value, least in (("--max-queue", self.max_queue, 0), ("--max-body", self.max_body, 1)):
            if value < least:
                raise ConfigError(f"{flag} {value}: expected at least {least}")
        if not 0 < self.request_timeout < math.inf:
            raise ConfigError(f"--request-timeout {self.request_timeout:g}: expected a number of seconds above 0")
