"""Reading the engine's distributed checkpoints (`--ckpt-format torch_dist`)."""

from pathlib import Path

METADATA_FILE = ".metadata"


class DistSource:
    def __init__(self, directory: str | Path) -> None:
        raise NotImplementedError
