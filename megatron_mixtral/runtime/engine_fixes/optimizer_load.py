"""What an optimizer takes over from a checkpoint: state, and the count of steps. Its settings are those of the run.

A parameter group holds both: `params` and `step`, and beside them learning rates, weight decay, betas, eps, momentum.
The engine finds a saved group by its learning rates, and then takes every setting of it. Here a group is found by what
it is (dense or expert, with weight decay or without, with learning rates of its own or not), and the run's settings
stay. `runtime/saving.py` names those that `--use-checkpoint-opt_param-scheduler` keeps in `kept_settings`.
"""

import pkgutil
from collections.abc import Sequence
from typing import Any

import torch

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.runtime.engine_fixes.expert_optimizers import groups_of, with_groups
from megatron_mixtral.runtime.replacements import Fix, around, source_has

Group = dict[str, Any]
_STATE = ("params", "step")
_KINDS = (("is_expert_parallel", False), ("wd_mult", 1.0), ("lr_mult", 1.0), ("default_config", True),
          ("is_decoupled_lr", False), ("optimizer", None))
_RANKED = ("max_lr", "min_lr", "start_wd", "end_wd")  # groups of one kind are told apart by the order of these


def settled(saved: Sequence[Group], now: Sequence[Group], kept: Sequence[str] = ()) -> list[Group]:
    """The groups of a checkpoint with the settings of the run's groups, `now`; but the settings `kept` are set in `now`
    to what the checkpoint has. `CheckpointError` where a kind of group is missing, or there are more of it.
    """
    groups = [dict(group) for group in saved]
    for kind in {_kind(group) for group in now}:
        ours, theirs = _by_rank(now, kind), _by_rank(groups, kind)
        if len(ours) != len(theirs):
            raise CheckpointError(
                f"the optimizer has {len(ours)} group(s) of parameters of the kind {_words(kind)}, the checkpoint has "
                f"{len(theirs)}: give --decoupled-lr and --no-weight-decay-cond-type as they were, or "
                "--no-load-optim to begin with a new optimizer")
        for mine, found in zip(ours, theirs, strict=True):
            for group in mine:
                group.update({name: found[0][name] for name in kept if name in found[0]})
            for group in found:
                group.update({name: value for name, value in mine[0].items() if name not in _STATE})
    return groups


def _kind(group: Group) -> tuple[Any, ...]:
    return tuple(group.get(name, group.get(f"pre_{name}", default)) for name, default in _KINDS)


def _words(kind: tuple[Any, ...]) -> str:
    return ", ".join(f"{name} {value}" for (name, default), value in zip(_KINDS, kind, strict=True) if value != default
                     ) or "with no setting of their own"


def _by_rank(groups: Sequence[Group], kind: tuple[Any, ...]) -> list[list[Group]]:
    """The groups of one kind: those with the same learning rates together, ascending."""
    ranked: dict[tuple[float, ...], list[Group]] = {}
    for group in groups:
        if _kind(group) == kind:
            ranked.setdefault(tuple(float(group.get(name) or 0) for name in _RANKED), []).append(group)
    return [ranked[rank] for rank in sorted(ranked)]


def _with_settings_of_the_run(load_state_dict: Any, optimizer: Any, state_dict: Any) -> Any:
    """`state_dict`: of one optimizer, or a list or numbered dict of several."""
    chained, kept = optimizer.chained_optimizers, getattr(optimizer, "kept_settings", ())
    if len(chained) == 1:
        state_dict = _settle(chained[0], state_dict, kept)
    elif len(chained) == len(state_dict):
        parts = [state_dict[key] for key in sorted(state_dict)] if isinstance(state_dict, dict) else state_dict
        state_dict = [_settle(one, part, kept) for one, part in zip(chained, parts, strict=True)]
    return load_state_dict(optimizer, state_dict)


def _settle(optimizer: Any, state: Any, kept: Sequence[str]) -> Any:
    if optimizer.is_stub_optimizer or "param_groups" not in state.get("optimizer", state):  # Megatron-FSDP's form
        return state
    return with_groups(state, settled(groups_of(state), optimizer.param_groups, kept))


def _with_momentum(make: Any, *args: Any, **kwargs: Any) -> Any:
    optimizer = make(*args, **kwargs)
    if isinstance(getattr(optimizer, "optimizer", None), torch.optim.SGD):
        optimizer.init_state_fn = _start_momentum
    return optimizer


def _start_momentum(optimizer: torch.optim.SGD, config: Any = None) -> None:
    """The state before the first step: with zeros, torch's SGD takes the same first step as without."""
    for group in optimizer.param_groups:
        for param in group["params"] if group["momentum"] else ():
            optimizer.state[param].setdefault("momentum_buffer", torch.zeros_like(param))


FIX = Fix(
    name="changed-settings",
    symptom="--lr or --min-lr changed on resume: KeyError; --adam-beta1, --adam-beta2, --adam-eps and --sgd-momentum "
            "changed: ignored without a word",
    cause="a saved group of parameters is found by its learning rates, and then all of its settings are taken",
    versions="0.19.2",
    remove_when="groups are matched without max_lr and min_lr, and settings are not read from a checkpoint",
    needed=lambda: "max_lr" in pkgutil.resolve_name("megatron.core.optimizer.optimizer:param_group_identifier_keys"),
    apply=around("megatron.core.optimizer.optimizer:ChainedOptimizer.load_state_dict", _with_settings_of_the_run),
)

SGD_FIX = Fix(
    name="sgd-state",
    symptom="a distributed checkpoint of a run with --optimizer sgd cannot be loaded: 'NoneType' object is not "
            "callable",
    cause="the engine has no function that makes SGD's state before the first step, and calls it when loading",
    versions="0.19.2",
    remove_when="_get_megatron_optimizer_based_on_param_groups gives SGD an init_state_fn",
    needed=source_has("megatron.core.optimizer:_get_megatron_optimizer_based_on_param_groups",
                      "momentum=config.sgd_momentum,\n            )\n            init_state_fn = None"),
    apply=around("megatron.core.optimizer:_get_megatron_optimizer_based_on_param_groups", _with_momentum),
)
