"""What a server is told; `docs/inference.md` explains the flags. Standard library only."""

import math
from dataclasses import dataclass

from megatron_mixtral.errors import ConfigError


def allowed(name: str) -> bool:
    """Whether a model may be called so: visible characters alone, at least one."""
    return bool(name) and name.isprintable() and " " not in name


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
        for flag, name in (("--served-model-name", self.model), ("--served-adapter-name", self.adapter)):
            if name is not None and not allowed(name):
                raise ConfigError(f"{flag} {name!r} is no name that can be asked for: expected letters, digits and "
                                  "signs of any script, at least one, without spaces and control characters")
        if self.adapter == self.model:
            raise ConfigError(f"the model and its adapters are both called {self.model!r}: give another "
                              "--served-adapter-name, or --served-model-name")
        for flag, value, least in (("--max-queue", self.max_queue, 0), ("--max-body", self.max_body, 1)):
            if value < least:
                raise ConfigError(f"{flag} {value}: expected at least {least}")
        if not 0 < self.request_timeout < math.inf:
            raise ConfigError(f"--request-timeout {self.request_timeout:g}: expected a number of seconds above 0")
