"""Checkpoints of a run: the identity beside the weights, and the start from Hugging Face weights."""

import logging
import os
from pathlib import Path
from typing import Any

import torch

from megatron_mixtral.config import CONFIG_FILE, Coord, MixtralConfig, ParallelLayout
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights import HFSource, ShardPlan, assemble

logger = logging.getLogger(__name__)


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
    source = HFSource(directory, model.mixtral)
    source.check()
    parameters = dict(model.named_parameters())
    plan = ShardPlan(model.mixtral, layout, coord, chunk, padded_vocab)
    with torch.no_grad():
        for tensor in plan.tensors():
            parameter = parameters.pop(_name_in(parameters, tensor), None)
            if parameter is None:
                raise CheckpointError(f"{tensor.name} of {directory} has no place in this model stage")
            if tuple(parameter.shape) != tuple(tensor.shape):
                raise CheckpointError(f"{tensor.name}: the model has shape {tuple(parameter.shape)}, "
                                      f"{directory} gives {tuple(tensor.shape)}")
            parameter.copy_(assemble(tensor, source, parameter.dtype))
    if parameters:
        raise CheckpointError(f"{directory} gives no value for {sorted(parameters)}")
    logger.info("loaded %s, stage %s", directory, coord)


def _name_in(parameters: dict[str, torch.nn.Parameter], tensor: Any) -> str:
    """The name a slice has in this model: the local spec's, or transformer-engine's."""
    if tensor.name in parameters:
        return tensor.name
    return next((name for name in tensor.aliases if name in parameters), tensor.name)
