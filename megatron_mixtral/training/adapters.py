"""A run that trains adapters: its flags, its base, what it starts from, and what it may be resumed from.

`arguments` asks before torch is imported; `pretrain` then has an `AdapterRun` build and fill the model.
"""

import dataclasses
import logging
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mixtral.config import AdapterConfig, MixtralConfig, ParallelLayout
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.weights import hf_tensors, open_source
from megatron_mixtral.weights.adapters import FreshAdapters, fingerprint, names_in

if TYPE_CHECKING:
    from megatron_mixtral.training.flags import Flags

logger = logging.getLogger(__name__)

_FLAGS = {"rank": "--lora-rank", "alpha": "--lora-alpha", "targets": "--lora-target-modules", "quantized": "--qlora"}


def of_flags(flags: "Flags", config: MixtralConfig, layout: ParallelLayout) -> AdapterConfig | None:
    """The adapters that are asked for, or None. `ConfigError` for flags that do not go together."""
    if flags.lora_rank is None:
        for name in ("qlora", "adapter"):
            if getattr(flags, name):
                raise ConfigError(f"--{name} is of a run that trains adapters: give --lora-rank, or drop it")
        return None
    if flags.hf_checkpoint is None:
        raise ConfigError("--lora-rank trains adapters of a model that is there already, and checkpoints hold the "
                          "adapters alone: give the base with --hf-checkpoint DIR, at every start")
    if flags.no_moe_grouped_gemm:
        raise ConfigError("--no-moe-grouped-gemm: adapters of experts are computed in grouped products; drop it")
    adapter = AdapterConfig.from_args(config, flags)
    adapter.check_blocks(layout)
    if flags.export_hf_interval is not None:
        for tensor in hf_tensors(adapter).values():
            names_in(adapter, tensor)  # raises where an export would fail
    return adapter


def described(adapter: AdapterConfig) -> str:
    """A sentence for the log."""
    total = adapter.total_parameters + adapter.trained_parameters
    return (f"trains adapters of rank {adapter.rank}, alpha {adapter.alpha:g}, on {', '.join(adapter.targets)}: "
            f"{adapter.trained_parameters:,} parameters, {adapter.trained_parameters / total:.2%} of all"
            + (", the base in 4 bits" if adapter.quantized else ""))


def check_saved(saved: Any, args: Namespace, directory: Path) -> None:
    """`CheckpointError` where a checkpoint, by the arguments in it, does not hold the adapters that this run trains."""
    was, now = getattr(saved, "lora_rank", None), args.lora_rank
    if was is None and now is None:
        return
    if was is None:
        raise CheckpointError(f"{directory} holds a whole model, and this run trains adapters (--lora-rank "
                              f"{now}): give another --load; to adapt that model, convert it to Hugging Face's form "
                              "and give it as --hf-checkpoint")
    if now is None:
        raise CheckpointError(f"{directory} holds adapters of rank {was}, and this run trains the whole model: give "
                              f"--lora-rank {was} and the other flags of the run that saved it, or merge them first")
    ours, theirs = (AdapterConfig.from_args(MixtralConfig(), one) for one in (args, saved))
    for name, flag in _FLAGS.items():
        if getattr(ours, name) != getattr(theirs, name):
            raise CheckpointError(f"{directory} holds adapters with {flag} {_word(getattr(theirs, name))}, this run "
                                  f"has {_word(getattr(ours, name))}: give the same, or begin anew in another --save")
    check_base(theirs, ours, directory)


def check_base(adapter: AdapterConfig, run: AdapterConfig, where: Path) -> None:
    """`CheckpointError` where adapters were trained on another base than the run's."""
    if None not in (adapter.base, run.base) and adapter.base != run.base:
        raise CheckpointError(f"{where} holds adapters of the base {adapter.base} ({adapter.base_name}), and "
                              f"--hf-checkpoint {run.base_name} is {run.base}: on another base they mean nothing; give "
                              "the base that they were trained on")


def _word(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


class AdapterRun:
    """What builds and fills the model of such a run, on every rank."""

    def __init__(self, flags: "Flags", adapter: AdapterConfig, args: Namespace) -> None:
        """`args` are the engine's; the base's hash goes into them, and so into every checkpoint."""
        if args.ckpt_format != "torch_dist":
            raise ConfigError(f"--ckpt-format {args.ckpt_format}: adapters are saved as distributed checkpoints; drop "
                              "the flag")
        args.lora_base = fingerprint(open_source(flags.hf_checkpoint))
        self.adapter, self._args = dataclasses.replace(adapter, base=args.lora_base), args
        self._start = flags.adapter
        from megatron_mixtral.lora import Guard

        self._guard = Guard(self.adapter, masked=flags.is_instruction_dataset)

    def build(self, engine: Any, **options: Any) -> Any:
        """One pipeline stage or model chunk."""
        from megatron_mixtral.lora import adapted

        return adapted(self.adapter, engine, **options)

    def base_places(self, model: Any) -> dict[str, Any]:
        """Where the base goes."""
        from megatron_mixtral.lora import base_places

        return base_places(model)

    def fill(self, model: Any, into: Callable[..., None]) -> None:
        """Fill the adapters of a model: with those of --adapter, or new ones."""
        from megatron_mixtral.lora import adapter_places

        into(self._source(), places=adapter_places(model))
        self._guard.watch(model, into.keywords["coord"], into.keywords["layout"], into.keywords["chunk"])

    def look(self, tokens: Any) -> None:
        """After a step: whether what is to be trained is trained. `tokens` [layers, experts] of all ranks."""
        self._guard.look(tokens)

    def _source(self) -> Any:
        if self._start is None:
            return FreshAdapters(self.adapter, self._args.seed)
        source = open_source(self._start, base=self.adapter.model, holds="adapters")
        for name in ("rank", "alpha", "targets"):
            ours, theirs = getattr(self.adapter, name), getattr(source.config, name)
            if ours != theirs:
                raise ConfigError(f"--adapter {self._start} has {name} {_word(theirs)}, {_FLAGS[name]} is "
                                  f"{_word(ours)}: give the adapter's")
        check_base(source.config, self.adapter, Path(self._start))
        return source
