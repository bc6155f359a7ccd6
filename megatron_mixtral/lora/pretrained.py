"""A ready model with adapters: `from_pretrained(base, adapter, layout)`, as `model.from_pretrained` without them."""

import logging
from pathlib import Path
from typing import Any

import torch

from megatron_mixtral import runtime
from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.lora.apply import AdaptedModel, adapted, adapter_places, base_places
from megatron_mixtral.model import fill, initialize, transformer_config, type_name
from megatron_mixtral.weights import ShardPlan, open_source
from megatron_mixtral.weights.adapters import fingerprint

logger = logging.getLogger(__name__)


def from_pretrained(base: str | Path, adapter: str | Path, layout: ParallelLayout = ParallelLayout(),  # noqa: B008 - it is frozen
                    dtype: Any = None, **fields: Any) -> AdaptedModel:
    """This rank's pipeline stage of the model `base` with the adapters of `adapter` beside it, in evaluation mode.

    `adapter` is a PEFT folder or a checkpoint of adapters; the others are as for `model.from_pretrained`. The base is
    in 4 bits if the adapters were trained so. Raises `CheckpointError` for adapters of another base, and where
    something cannot be read.
    """
    source = open_source(base, holds="model")
    adapters = open_source(adapter, base=source.config, holds="adapters")
    config, kind = adapters.config, getattr(torch, type_name(dtype, source))
    if config.base is None:
        logger.info("%s does not say by a hash which base its adapters are of: %s is taken for it", adapter, base)
    elif config.base != (found := fingerprint(source)):
        raise CheckpointError(f"{adapter} holds adapters of the base {config.base} ({config.base_name}), and {base} is "
                              f"{found}: on another base they mean nothing")
    config.check_blocks(layout)
    layout = initialize(layout, source.config)
    coord = layout.coord_of(torch.distributed.get_rank())
    rows = ShardPlan(source.config, layout, coord).vocab_rows
    engine = transformer_config(source.config, layout, kind, **{"perform_initialization": False, **fields})
    model = adapted(config, engine, max_sequence_length=config.max_position_embeddings, padded_vocab_size=rows,
                    pre_process=layout.is_first(coord.pp), post_process=layout.is_last(coord.pp))
    model.to(runtime.current_device(), kind)
    for each, places in ((source, base_places(model)), (adapters, adapter_places(model))):
        fill(model, each, coord, layout, padded_vocab=rows, places=places)
    return model.eval()
