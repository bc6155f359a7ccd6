"""A ready model with adapters: `from_pretrained(base, adapter, layout)`, as `model.from_pretrained` without them."""

from pathlib import Path
from typing import Any

import torch

from megatron_mixtral import runtime
from megatron_mixtral.config import AdapterConfig, ParallelLayout
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.lora.apply import AdaptedModel, adapted, adapter_places, base_places
from megatron_mixtral.model import fill, initialize, transformer_config
from megatron_mixtral.weights import ShardPlan, open_source
from megatron_mixtral.weights.adapters import fingerprint


def from_pretrained(base: str | Path, adapter: str | Path, layout: ParallelLayout = ParallelLayout(),  # noqa: B008 - it is frozen
                    dtype: Any = torch.bfloat16, **fields: Any) -> AdaptedModel:
    """This rank's pipeline stage of the model `base` with the adapters of `adapter` beside it, in evaluation mode.

    `adapter` is a PEFT folder or a checkpoint of adapters; `base`, `layout` and `fields` are as for
    `model.from_pretrained`, `dtype` is torch's. The base is in 4 bits if the adapters were trained so. Raises
    `CheckpointError` for adapters of another base, and where something cannot be read.
    """
    source = open_source(base)
    adapters = open_source(adapter, base=source.config)
    config = adapters.config
    if not isinstance(config, AdapterConfig):
        raise ConfigError(f"{adapter} holds a whole model, expected adapters")
    if config.base is not None and config.base != (found := fingerprint(source)):
        raise CheckpointError(f"{adapter} holds adapters of the base {config.base} ({config.base_name}), and {base} is "
                              f"{found}: on another base they mean nothing")
    layout = initialize(layout)
    coord = layout.coord_of(torch.distributed.get_rank())
    rows = ShardPlan(source.config, layout, coord).vocab_rows
    engine = transformer_config(source.config, layout, dtype, **{"perform_initialization": False, **fields})
    model = adapted(config, engine, max_sequence_length=config.max_position_embeddings, padded_vocab_size=rows,
                    pre_process=layout.is_first(coord.pp), post_process=layout.is_last(coord.pp))
    model.to(runtime.current_device(), dtype)
    for each, places in ((source, base_places(model)), (adapters, adapter_places(model))):
        fill(model, each, coord, layout, padded_vocab=rows, places=places)
    return model.eval()
