"""What a run on plain text is told."""

import os
from dataclasses import dataclass

from megatron_mixtral.data.options import Options
from megatron_mixtral.errors import ConfigError


@dataclass(frozen=True)
class TextOptions(Options):
    """Plain text to pretraining data: the texts of `keys`, one dataset for each key; shard `shard_index` of
    `num_shards`.
    """

    keys: tuple[str, ...] = ("text",)
    tokenizer_engine: str = "auto"
    allow_special_in_text: bool = False
    num_shards: int = 1
    shard_index: int = 0

    @property
    def shard_prefix(self) -> str:
        """The output prefix, with the number of the shard where there is more than one."""
        if self.num_shards == 1:
            return self.output_prefix
        return f"{self.output_prefix}-{self.shard_index:05d}-of-{self.num_shards:05d}"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.keys)) != len(self.keys) or not self.keys:
            raise ConfigError(f"--json-keys {' '.join(self.keys)}: give at least one key, and each once.")
        for key in self.keys:
            if not key or os.sep in key or "\0" in key:
                raise ConfigError(f"--json-keys {key!r} cannot be part of a file name ({{prefix}}_{{key}}_document).")
        if not 0 <= self.shard_index < self.num_shards:
            raise ConfigError(
                f"--shard-index {self.shard_index} must be from 0 to {self.num_shards - 1} (--num-shards - 1)."
            )
