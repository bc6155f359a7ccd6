"""Older namings of rank files, seen under the names of today's local layer specification.

* `GroupedMLP` of older engines: all experts of a rank in `mlp.experts.weight1` (H, E * 2F) and `weight2`
  (E * F, H), whose memory is (E, H, 2F) and (E, F, H): the transposes of each expert's fc1 and fc2 in order.
* `megatron.legacy.model.GPTModel` (`language_model.encoder.layers.N`), which Mixtral forks of early 2024 trained, with
  experts as above, or one by one as `mlp.block.moe_layer.experts.experts.M.w1`, `w2`, `w3` (DeepSpeed's MoE).

E, F and H are a rank's experts, its share of the expert intermediate size, and the hidden size. Everything is a view of
the mapped file. Called by `rank_source`.
"""

import re
from collections.abc import Iterator
from typing import Any

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.files import Stored

# One tensor, or the pieces that it is made of, in the order in which they are joined.
Parts = Stored | tuple[Stored, ...]

LEGACY = "language_model."
VERSION = 3.0  # of rank files whose query, key and value rows are in the order of groups
_RENAMED = {
    "input_norm": "input_layernorm", "post_attention_norm": "pre_mlp_layernorm",
    "self_attention.query_key_value": "self_attention.linear_qkv", "self_attention.dense": "self_attention.linear_proj",
    "mlp.block.moe_layer.gate.weight": "mlp.router",
}
_GROUPED = re.compile(r"(.*\.mlp\.experts\.)weight([12])")
_SINGLE = re.compile(r"(.*\.mlp\.)block\.moe_layer\.experts\.experts\.(\d+)\.w([123])\.weight")


def today(group: dict[str, Any], experts: int, version: Any, where: str) -> dict[str, Any]:
    """The state dict `group` of a rank with `experts` experts, under today's names (to `Parts`, or what else it holds).

    `version` is the file's `checkpoint_version`. Raises `CheckpointError` where it is not clear what is meant.
    """
    try:
        flat = dict(_flat(group, ""))
    except RecursionError:
        raise CheckpointError(f"{where}: has a dictionary that holds itself") from None
    if any(name.startswith(LEGACY) for name in flat):
        mixed = [name for name in flat if name.startswith("decoder.")]
        if mixed:
            raise CheckpointError(f"{where}: has names of two kinds, {mixed[0]} and {LEGACY}...; which are the model's "
                                  "cannot be known")
        if not isinstance(version, float | int) or version < VERSION:
            raise CheckpointError(f"{where}: has checkpoint_version {version}, expected {VERSION}: older ones store "
                                  "query, key and value rows in another order")
        flat = {_renamed(name): value for name, value in flat.items()}
    found: dict[str, Any] = {}
    for name, value in _joined(flat, where).items():
        match = _GROUPED.fullmatch(name)
        for new, part in _split(match, value, experts, where) if match else [(name, value)]:
            if new in found:
                raise CheckpointError(f"{where}: {new} is stored twice, once as {name}")
            found[new] = part
    return found


def _flat(group: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """The legacy model nests its state dict: a dictionary of each of its parts."""
    for name, value in group.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name), value


def _renamed(name: str) -> str:
    name = name.removeprefix(LEGACY)
    layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)\.weight", name)
    if layer is not None and layer[2] in _RENAMED:
        return f"decoder.layers.{layer[1]}.{_RENAMED[layer[2]]}.weight"
    return {"encoder.final_norm.weight": "decoder.final_layernorm.weight"}.get(
        name, re.sub(r"^encoder\.", "decoder.", name))


def _joined(flat: dict[str, Any], where: str) -> dict[str, Any]:
    """Experts one by one: w1 above w3 is fc1, w2 is fc2."""
    found, single = {}, {}
    for name, value in flat.items():
        match = _SINGLE.fullmatch(name)
        if match is None:
            found[name] = value
        else:
            single.setdefault(f"{match[1]}experts.local_experts.{match[2]}.", {})[match[3]] = value
    for name, parts in single.items():
        if parts.keys() != {"1", "2", "3"}:
            raise CheckpointError(f"{where}: {name} has w{', w'.join(sorted(parts))}, expected w1, w2 and w3")
        found |= {f"{name}linear_fc1.weight": (parts["1"], parts["3"]), f"{name}linear_fc2.weight": parts["2"]}
    return found


def _split(match: re.Match[str], value: Any, experts: int, where: str) -> Iterator[tuple[str, Stored]]:
    """The fc1 or fc2 of each expert in a tensor of all of them."""
    data = value.data if isinstance(value, Stored) else None
    if data is None or data.ndim != 2 or not data.flags.c_contiguous:
        raise CheckpointError(f"{where}: {match[0]} is not a matrix of floating point weights")
    rows, columns = value.shape
    shape = (experts, rows, columns // experts) if match[2] == "1" else (experts, rows // experts, columns)
    if shape[0] * shape[1] * shape[2] != rows * columns:
        raise CheckpointError(f"{where}: {match[0]} of shape {value.shape} does not divide into {experts} experts")
    for index, part in enumerate(data.reshape(shape)):
        yield (f"{match[1]}local_experts.{index}.linear_fc{match[2]}.weight",
               Stored(part.T, value.dtype, part.shape[::-1]))
