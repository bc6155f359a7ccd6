"""A ready model from weights on the disk: `from_pretrained(directory, layout)`, in one process or on torchrun's ranks.

The weights may be a Hugging Face directory, rank directories of any layout, or a distributed checkpoint: each rank
reads its own slices. Training fills its model stages with the same `fill`.
"""

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mixtral import runtime
from megatron_mixtral.config import Coord, MixtralConfig, ParallelLayout
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.weights import ShardPlan, assemble, hf_tensors, open_source

if TYPE_CHECKING:
    from megatron_mixtral.model.builder import MixtralModel

logger = logging.getLogger(__name__)

SEED = 1234  # of the engine's random numbers, which a model without dropout does not draw
DTYPES = ("float32", "bfloat16", "float16")
_SIZES = {axis: f"ParallelLayout({axis}=...)" for axis in ("tp", "pp", "vpp", "ep", "etp", "cp", "first", "last")}
_SIZES["world"] = "the number of processes (torchrun --nproc-per-node)"


def from_pretrained(directory: str | Path, layout: ParallelLayout = ParallelLayout(), dtype: Any = None,  # noqa: B008 - it is frozen
                    **fields: Any) -> "MixtralModel":
    """The engine's model of this rank (its pipeline stage), filled and in evaluation mode.

    `directory` is a Hugging Face folder, a directory of rank directories in any layout, or a distributed checkpoint.
    `layout` (default: one device) is over all ranks; one process by itself needs no torchrun. `dtype` is torch's, or
    its name: float32, bfloat16 or float16 (default: as stored). `fields` are further fields of `TransformerConfig`.

    Called with tokens and positions [b, s] and an attention mask of None, the last stage gives logits [b, s, v], v
    being this tensor-parallel rank's part of the padded vocabulary; other stages pass [s, b, h] on by the engine's
    schedules. `ConfigError` for a layout or a type that cannot be, `CheckpointError` for weights that cannot be read.
    """
    source = open_source(directory, holds="model")
    name = type_name(dtype, source)
    layout = initialize(layout, source.config)

    import torch

    # Only now, because importing the engine's models looks at the machine.
    from megatron_mixtral.model.builder import build, transformer_config

    config, kind = source.config, getattr(torch, name)
    coord = layout.coord_of(torch.distributed.get_rank())
    rows = ShardPlan(config, layout, coord).vocab_rows
    engine = transformer_config(config, layout, kind, **{
        "transformer_impl": runtime.ready().transformer_impl, "perform_initialization": False, **fields})
    model = build(config, engine, max_sequence_length=config.max_position_embeddings, padded_vocab_size=rows,
                  pre_process=layout.is_first(coord.pp), post_process=layout.is_last(coord.pp))
    model.to(runtime.current_device(), kind)
    fill(model, source, coord, layout, padded_vocab=rows)
    return model.eval()


def initialize(layout: ParallelLayout, config: MixtralConfig | None = None) -> ParallelLayout:
    """Ready the machine, the process groups and the engine for `layout`; returns it with the number of ranks.

    Where there is no process group yet, torchrun's ranks join one, and one process by itself makes its own. What is
    initialised already stays. `ConfigError` where the ranks do not fit the layout, or the engine has another one, or
    where no model of `config` that is ready to use can lie so.
    """
    if config is not None:
        _validate(config, layout)
    layout = dataclasses.replace(layout, world=runtime.join_process_group(runtime.ready()))
    layout.validate_world(_SIZES)
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    if not mpu.model_parallel_is_initialized():
        mpu.initialize_model_parallel(
            layout.tp, layout.pp, layout.vpp if layout.vpp > 1 else None, context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=layout.etp)
    found = ParallelLayout(
        tp=mpu.get_tensor_model_parallel_world_size(), pp=mpu.get_pipeline_model_parallel_world_size(),
        vpp=mpu.get_virtual_pipeline_model_parallel_world_size() or 1, ep=mpu.get_expert_model_parallel_world_size(),
        etp=mpu.get_expert_tensor_parallel_world_size(), cp=mpu.get_context_parallel_world_size(), world=layout.world,
        first=layout.first, last=layout.last)
    if found != layout:
        raise ConfigError(f"this process has process groups of layout {found}, asked for is {layout}: give the same "
                          "layout, or call megatron.core.parallel_state.destroy_model_parallel() before")
    if not get_cuda_rng_tracker().is_initialized():
        model_parallel_cuda_manual_seed(SEED)
    return layout


def fill(model: "MixtralModel", source: Any, coord: Coord, layout: ParallelLayout, *, chunk: int = 0,
         padded_vocab: int, places: dict[str, Any] | None = None) -> None:
    """Fill one pipeline stage (model chunk) from a `TensorSource`, in place, in the model's dtype.

    `places` are those that the source is to fill, by name (None: all parameters): parameters, or what else has their
    `shape`, `dtype` and `copy_`. Reads only this rank's slices. `CheckpointError` where the source is not exactly this
    model's weights.
    """
    import torch

    source.check()
    parameters = dict(model.named_parameters() if places is None else places)
    with torch.no_grad():
        for tensor in ShardPlan(source.config, layout, coord, chunk, padded_vocab).tensors():
            names = (tensor.name, *tensor.aliases)  # the local spec's, and transformer-engine's
            parameter = next((parameters.pop(name) for name in names if name in parameters), None)
            if parameter is None:
                raise CheckpointError(f"{tensor.name} of {source.where} has no place in this model stage")
            if tuple(parameter.shape) != tuple(tensor.shape):
                raise CheckpointError(f"{tensor.name}: the model has shape {tuple(parameter.shape)}, "
                                      f"{source.where} gives {tuple(tensor.shape)}")
            parameter.copy_(assemble(tensor, source, parameter.dtype))
    if parameters:
        raise CheckpointError(f"{source.where} gives no value for {sorted(parameters)}")
    source.mapped.check_sums(fill=False)  # what one rank has read in part, it does not read whole for this
    source.mapped.release()
    logger.info("loaded %s, stage %s", source.where, coord)


def _validate(config: MixtralConfig, layout: ParallelLayout) -> None:
    if layout.vpp > 1:
        raise ConfigError(f"ParallelLayout(vpp={layout.vpp}): virtual stages are a schedule of training, a model that "
                          "is ready to use has one chunk a rank; leave vpp out (weights of any layout are read)")
    dataclasses.replace(layout, world=None).validate(config, _SIZES)


def type_name(dtype: Any, source: Any) -> str:
    """The name of the type that a model of these weights gets: that of `dtype`, or else as they are stored.
    `ConfigError` for one in which no model computes.
    """
    name = str(dtype).removeprefix("torch.") if dtype is not None else \
        source.dtype(next(iter(hf_tensors(source.config).values())))
    if name not in DTYPES:
        said = "stored as" if dtype is None else "dtype is"
        raise ConfigError(f"{source.where}: {said} {name}, a model computes in {', '.join(DTYPES)}: give one as dtype")
    return name
