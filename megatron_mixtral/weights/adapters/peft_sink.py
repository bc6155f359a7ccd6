"""Writing adapters in PEFT's form, by expert or fused; see `peft_source` for both.

The same adapters give the same bytes, whatever layout trained them.
"""

import json
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy

from megatron_mixtral.config import CONFIG_FILE, AdapterConfig
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.weights.adapters.peft_source import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    IDENTITY_FILE,
    fused_name,
    names_in,
    target_in,
)
from megatron_mixtral.weights.dtypes import FLOATS, cast
from megatron_mixtral.weights.files import file_layout, safetensors
from megatron_mixtral.weights.plan import whole
from megatron_mixtral.weights.protocols import Output, TensorSource
from megatron_mixtral.weights.rules import HFTensor, hf_tensors
from megatron_mixtral.weights.streaming import payload

FORMS = ("per-expert", "v5")


class PeftSink:
    """A folder of PEFT's to be written at `target`. `form`: "per-expert", or "v5", as PEFT writes on transformers 5; of
    a dense model, whose names have no experts, either is the same.
    """

    contents = ("adapters",)

    def __init__(self, target: str | Path, *, form: str = "per-expert", replace: bool = False) -> None:
        if form not in FORMS:
            raise ConfigError(f"--adapter-format {form}: expected one of {', '.join(FORMS)}")
        self.target, self.replace, self.fused = Path(target), replace, form == "v5"

    def plan(self, source: TensorSource, dtypes: dict[str, str]) -> Output:
        """One file of tensors, and the configuration."""
        config, fused = source.config, self.fused and source.config.dense_config is None
        tensors = hf_tensors(config).values()
        apart = [one for one in tensors if not (fused and one.rule.per_expert)]
        found = [payload(replace(whole(one), name=names_in(config, one)[0]), source, dtypes) for one in apart]
        if fused:
            place = partial(fused_name, config)
            inside = sorted((one for one in tensors if one.rule.per_expert), key=place)
            found += [_fused(name, list(group), source, dtypes) for name, group in groupby(inside, place)]
        beside = {ADAPTER_CONFIG: _peft_config(config, fused),
                  IDENTITY_FILE: {"base": config.base, "quantized": config.quantized}}
        return Output({ADAPTER_FILES[0]: safetensors.lay_out(found)},
                      {CONFIG_FILE: config.to_json().encode(),
                       **{name: (json.dumps(value, indent=2) + "\n").encode() for name, value in beside.items()}})


def _peft_config(config: AdapterConfig, fused: bool) -> dict[str, Any]:
    """Contents of adapter_config.json. No dropout: PEFT refuses to load it for experts, and loading is for use."""
    alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": config.base_name,
            "r": config.rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
            "target_modules": [target_in(config, name) for name in config.targets]}
    if not fused:
        return said
    up = "w1" in config.targets
    names = ["gate_up_proj"] * up + ["down_proj"] * ("w2" in config.targets)
    return said | {
        "target_modules": [name for name in config.targets if name not in ("w1", "w2", "w3")],
        "target_parameters": [f"mlp.experts.{name}" for name in names],
        "rank_pattern": {r".*\.gate_up_proj": 2 * config.rank} if up else {},
        "alpha_pattern": {r".*\.gate_up_proj": 2 * alpha} if up else {}}


def _fused(place: str, tensors: list[HFTensor], source: TensorSource, dtypes: dict[str, str]) -> file_layout.Payload:
    """The tensor of a layer's experts, made when it is written."""
    kinds = {dtypes[one.name] for one in tensors}
    if len(kinds) > 1:
        raise CheckpointError(f"{place}: its parts are of different types ({', '.join(sorted(kinds))})")
    [kind] = kinds
    config = source.config
    parts, experts = len({one.piece for one in tensors}), config.num_local_experts
    rank, (rows, columns) = config.rank, tensors[0].shape
    is_a = tensors[0].rule.name.endswith("_A")
    shape = (experts * parts * rank, columns) if is_a else (parts * rows, parts * rank * experts)

    def blocks(_: Sequence[Hashable]) -> Iterator[list[numpy.ndarray]]:
        out = numpy.zeros(shape, FLOATS[kind].carrier)
        by_a, by_b = (out.reshape(experts, parts, rank, -1), None) if is_a else (
            None, out.reshape(parts, rows, parts, rank, experts))
        for one in tensors:
            for fragment in source.fragments(one):
                at = slice(fragment.start, fragment.start + fragment.length)
                data = fragment.data if fragment.dtype == kind else cast(
                    numpy.ascontiguousarray(fragment.data), fragment.dtype, kind)
                cut_rows = one.rule.shard_dim < len(one.view) - 1
                data = data.reshape(-1, data.shape[-1])
                into = by_a[one.expert, one.piece] if is_a else by_b[one.piece, :, one.piece, :, one.expert]
                into[(at, slice(None)) if cut_rows else (slice(None), at)] = data
        yield [out.reshape(-1)]

    return file_layout.Payload(place, int(numpy.prod(shape)) * FLOATS[kind].itemsize, blocks, kind, shape)
