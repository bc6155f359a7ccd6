"""Optimizer state across expert-parallel sizes."""

from itertools import zip_longest
from typing import Any

from megatron_mixtral.runtime.replacements import Fix, around, source_has

_PLACE = "megatron.core.optimizer.optimizer:ChainedOptimizer.load_state_dict"


def regroup(saved: dict[Any, Any], wanted: int) -> dict[Any, Any]:
    """A chained optimizer's loaded state for `wanted` optimizers, whatever number it was saved by.

    With experts spread over ranks the engine keeps a dense and an expert optimizer, else one for both. Tensors have
    layout-free keys and were read into the structure of the optimizers that ask for them: at the top, or under 0 and 1.
    The settings of the groups (`param_groups`) and other plain values lie where the optimizers that saved had them.
    """
    parts = {key: value for key, value in saved.items() if isinstance(key, int)}
    top = {key: value for key, value in saved.items() if not isinstance(key, int)}
    if wanted == 1 and parts:  # saved by several, read by one
        groups = [group for part in parts.values() for group in groups_of(part)]
        return _joined(with_groups(parts[0], groups), top)
    if wanted > 1 and top:  # saved by one, read by several
        groups = [{**group, "is_expert_parallel": expert} for expert in (False, True) for group in groups_of(top)]
        top = with_groups(top, groups)
        return {index: _joined(top, parts.get(index, {})) for index in range(wanted)}
    return saved


def groups_of(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups of one optimizer's state: inside `optimizer`, where it has fp32 weights of its own, or beside it."""
    return state.get("optimizer", state)["param_groups"]


def with_groups(state: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    if "optimizer" in state:
        return {**state, "optimizer": {**state["optimizer"], "param_groups": groups}}
    return {**state, "param_groups": groups}


def _joined(settings: dict[str, Any], read: dict[str, Any]) -> dict[str, Any]:
    """Settings of the optimizers that saved, and what was read for this one.

    The engine takes the settings of a group by what the group is, and its parameters by their place in the list.
    """
    joined = {**settings, **read}
    for key in settings.keys() & read.keys():
        if key == "param_groups":
            pairs = zip_longest(settings[key], read[key], fillvalue={})
            joined[key] = [{"params": [], **group, **parameters} for group, parameters in pairs]
        elif isinstance(read[key], dict):
            joined[key] = _joined(settings[key], read[key])
    return joined


def _load_from_any_number(load_state_dict: Any, optimizer: Any, state_dict: Any) -> Any:
    if isinstance(state_dict, dict):
        state_dict = regroup(state_dict, len(optimizer.chained_optimizers))
    return load_state_dict(optimizer, state_dict)


FIX = Fix(
    name="expert-optimizers",
    symptom="resuming with EP 1 what was saved with EP 2 fails: KeyError 'optimizer'; the other way round too",
    cause="with EP > 1 two distributed optimizers are chained, with EP 1 there is one, and the parts of their "
          "state that are no tensors are stored in that structure",
    versions="0.19.2",
    remove_when="ChainedOptimizer.load_state_dict accepts the state of another number of optimizers",
    needed=source_has(_PLACE, "but got {len(state_dict)}"),
    apply=around(_PLACE, _load_from_any_number),
)
