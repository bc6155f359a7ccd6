"""Checkpoints of a run: the identity beside the weights, and the start from Hugging Face weights."""

import os
from pathlib import Path
from typing import Any

from megatron_mixtral.config import CONFIG_FILE, Coord, MixtralConfig, ParallelLayout
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.model import fill
from megatron_mixtral.weights import HFSource


def write_identity(directory: Path, config: MixtralConfig) -> None:
    """Write `mixtral_config.json` into a run's save directory, so that its checkpoints say what they are.

    A directory that holds another model's checkpoints is refused.
    """
    path = directory / CONFIG_FILE
    if path.is_file():
        found = MixtralConfig.from_checkpoint(directory)
        if found != config:
            raise CheckpointError(f"--save {directory} holds checkpoints of another model ({path} differs from the "
                                  "run's architecture): give another directory")
        return
    directory.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(config.to_json(), encoding="utf-8")
    os.replace(temporary, path)


def load_hf(model: Any, directory: str, coord: Coord, layout: ParallelLayout, *, chunk: int, padded_vocab: int) -> None:
    """Fill one pipeline stage (model chunk) with Hugging Face weights, in place, in the model's dtype.

    Reads only this rank's slices. `CheckpointError` where the directory is not exactly this model's weights.
    """
    fill(model, HFSource(directory, model.mixtral), coord, layout, chunk=chunk, padded_vocab=padded_vocab)
