"""Repairs of the pinned engine that every machine needs. Each says what breaks, why, and when it can go.

`needed()` looks at the engine itself, and a test asserts it for every repair: the day the engine is upgraded and no
longer needs one, that test fails and the repair is deleted.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mixtral.runtime.replacements import Replacements


@dataclass(frozen=True)
class Fix:
    """One repair. `versions` are the engine versions on which the defect was seen."""

    name: str
    symptom: str
    cause: str
    versions: str
    remove_when: str
    needed: Callable[[], bool]
    apply: Callable[[Replacements], None]


# -- dataset helpers -------------------------------------------------------------------------------------


def _wheel_has_helpers_without_makefile() -> bool:
    from megatron.core.datasets import utils

    return (importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
            and not (Path(utils.__file__).parent / "Makefile").exists())


def _skip_compilation(replacements: Replacements) -> None:
    from megatron.core.datasets import utils

    replacements.set(utils, "compile_helpers", lambda: None)


# -- optimizer -------------------------------------------------------------------------------------------


def _engine_falls_back_to_torch_adam() -> bool:
    from megatron.core import optimizer

    return optimizer.USING_PYTORCH_OPTIMIZER


def _stand_in_for_fused_adam(replacements: Replacements) -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from megatron_mixtral.runtime.adam import FusedAdam

    replacements.set(optimizer, "Adam", FusedAdam)
    replacements.set(distrib_optimizer, "Adam", FusedAdam)
    replacements.set(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    replacements.set(distrib_optimizer, "HAVE_APEX_OR_TE", True)


# -- logging ---------------------------------------------------------------------------------------------


def _first_log_keeps_its_sums() -> bool:
    from megatron.training import training

    return "should_reset = not is_first_iteration" in inspect.getsource(training.training_log)


def _log_each_step_by_itself(replacements: Replacements) -> None:
    from megatron.training import training
    from megatron.training.global_vars import get_args, get_tensorboard_writer

    original = training.training_log

    @functools.wraps(original)
    def training_log(*args: Any, **kwargs: Any) -> Any:
        if get_args().log_interval == 1:
            kwargs["is_first_iteration"] = False
        result = original(*args, **kwargs)
        # The engine has no place that is called once a step is logged; a writer that wants to know has this method.
        finish_step = getattr(get_tensorboard_writer(), "finish_step", None)
        if finish_step is not None:
            finish_step()
        return result

    replacements.set(training, "training_log", training_log)


# -- optimizer state across expert-parallel sizes ----------------------------------------------------------


def _chained_optimizers_must_be_as_many() -> bool:
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    return "but got {len(state_dict)}" in inspect.getsource(ChainedOptimizer.load_state_dict)


def regroup(saved: dict[Any, Any], wanted: int) -> dict[Any, Any]:
    """A chained optimizer's loaded state for `wanted` optimizers, whatever number it was saved by.

    With experts spread over ranks the engine keeps a dense and an expert optimizer, else one for both. Tensors have
    layout-free keys; what differs is where the rest lies (`optimizer.param_groups`, `param_state_sharding_type`): under
    0 and 1, or at the top. Numbered entries of a load hold the tensors of the optimizers that ask for them.
    """
    parts = {key: value for key, value in saved.items() if isinstance(key, int)}
    common = {key: value for key, value in saved.items() if not isinstance(key, int)}
    if wanted == 1 and parts and "optimizer" not in common:  # saved by several, wanted by one
        groups = [group for part in parts.values() for group in part["optimizer"]["param_groups"]]
        return {**parts[0], **common, "optimizer": {**parts[0]["optimizer"], "param_groups": groups}}
    if wanted > 1 and "optimizer" in common:  # saved by one, wanted by several
        groups = common["optimizer"]["param_groups"]
        groups = [{**group, "is_expert_parallel": expert} for expert in (False, True) for group in groups]
        common["optimizer"] = {**common["optimizer"], "param_groups": groups}
        return {index: {**common, **parts.get(index, {})} for index in range(wanted)}
    return saved


def _load_from_any_number_of_optimizers(replacements: Replacements) -> None:
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    original = ChainedOptimizer.load_state_dict

    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any) -> Any:
        if isinstance(state_dict, dict):
            state_dict = regroup(state_dict, len(self.chained_optimizers))
        return original(self, state_dict)

    replacements.set(ChainedOptimizer, "load_state_dict", load_state_dict)


FIXES: tuple[Fix, ...] = (
    Fix(
        name="dataset-helpers",
        symptom="training exits at start: 'Failed to compile the C++ dataset helper functions'",
        cause="megatron.training runs make in megatron/core/datasets; the wheel has the compiled helper, no Makefile",
        versions="0.19.2",
        remove_when="compile_helpers returns without make where helpers_cpp can be imported",
        needed=_wheel_has_helpers_without_makefile,
        apply=_skip_compilation,
    ),
    Fix(
        name="fused-adam",
        symptom="a distributed-optimizer checkpoint cannot be loaded before the first step: 'assert len(steps) == 1'",
        cause="without transformer-engine and apex the engine takes torch.optim.AdamW, which keeps `step` in each "
              "parameter's state and creates its state at the first step; the checkpoint code expects FusedAdam's form",
        versions="0.19.2",
        remove_when="DistributedOptimizer saves and loads torch.optim.AdamW at step 0",
        needed=_engine_falls_back_to_torch_adam,
        apply=_stand_in_for_fused_adam,
    ),
    Fix(
        name="expert-optimizers",
        symptom="resuming with EP 1 what was saved with EP 2 fails: KeyError 'optimizer'; the other way round too",
        cause="with EP > 1 two distributed optimizers are chained, with EP 1 there is one, and the parts of their "
              "state that are no tensors are stored in that structure",
        versions="0.19.2",
        remove_when="ChainedOptimizer.load_state_dict accepts the state of another number of optimizers",
        needed=_chained_optimizers_must_be_as_many,
        apply=_load_from_any_number_of_optimizers,
    ),
)

TRAINING_FIXES: tuple[Fix, ...] = (
    Fix(
        name="step-figures",
        symptom="with --log-interval 1 the second printed 'lm loss' is the mean of the first two steps",
        cause="training_log prints the first iteration of a run without resetting its running sums",
        versions="0.19.2",
        remove_when="training_log resets its sums whenever it prints, and calls something when a step is logged",
        needed=_first_log_keeps_its_sums,
        apply=_log_each_step_by_itself,
    ),
)


def apply(replacements: Replacements, fixes: tuple[Fix, ...] = FIXES) -> list[str]:
    """Apply every repair of `fixes` that this installation needs; returns their names."""
    applied = []
    for fix in fixes:
        if fix.needed():
            fix.apply(replacements)
            applied.append(fix.name)
    return applied
