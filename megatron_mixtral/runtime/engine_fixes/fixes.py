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

from megatron_mixtral.runtime.engine_fixes import nonfinite, optimizer_state, recompute
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

    from megatron_mixtral.runtime.engine_fixes.adam import FusedAdam

    replacements.set(optimizer, "Adam", FusedAdam)
    replacements.set(distrib_optimizer, "Adam", FusedAdam)
    replacements.set(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    replacements.set(distrib_optimizer, "HAVE_APEX_OR_TE", True)


def _engine_scales_through_copies() -> bool:
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    return clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale


def _scale_in_place(replacements: Replacements) -> None:
    from megatron.core.optimizer import clip_grads

    from megatron_mixtral.runtime.engine_fixes import multi_tensor

    replacements.set(clip_grads, "multi_tensor_scale_impl", multi_tensor.scale)
    replacements.set(clip_grads, "l2_norm_impl", multi_tensor.l2_norm)


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
        name="gradient-clipping",
        symptom="clipping waits for the device once a parameter and makes a copy of every gradient",
        cause="the engine's stand-ins for apex's multi-tensor kernels take norms with float() and scale with copy_",
        versions="0.19.2",
        remove_when="local_multi_tensor_scale and local_multi_tensor_l2_norm work in place and on the device",
        needed=_engine_scales_through_copies,
        apply=_scale_in_place,
    ),
    Fix(
        name="expert-optimizers",
        symptom="resuming with EP 1 what was saved with EP 2 fails: KeyError 'optimizer'; the other way round too",
        cause="with EP > 1 two distributed optimizers are chained, with EP 1 there is one, and the parts of their "
              "state that are no tensors are stored in that structure",
        versions="0.19.2",
        remove_when="ChainedOptimizer.load_state_dict accepts the state of another number of optimizers",
        needed=optimizer_state.chained_optimizers_must_be_as_many,
        apply=optimizer_state.load_from_any_number,
    ),
    Fix(
        name="bucket-padding",
        symptom="with --overlap-grad-reduce (several buckets), a data-parallel size that the buckets' lengths are no "
                "multiple of, and --dist-ckpt-optim-fully-reshardable, the saved optimizer and fp32 weights are wrong",
        cause="the gathered state has no padding between buckets, and parameters are cut out of it at offsets that "
              "count the padding; what overshoots is filled with zeros (NVIDIA/Megatron-LM#5077)",
        versions="0.16.1 to 0.19.2",
        remove_when="sharded_param_state_fully_reshardable subtracts the padding of the buckets before a parameter",
        needed=optimizer_state.slices_forget_the_padding,
        apply=optimizer_state.count_the_padding,
    ),
    Fix(
        name="fp32-rank-directories",
        symptom="an fp32 run with the distributed optimizer cannot go on from rank directories (--ckpt-format torch): "
                "'a view of a leaf Variable that requires grad is being used in an in-place operation'",
        cause="the optimizer's fp32 weights are then views of the model's own, and are set with gradients enabled",
        versions="0.19.2",
        remove_when="load_parameter_state_from_dp_zero sets weights under torch.no_grad",
        needed=optimizer_state.fp32_weights_are_leaves,
        apply=optimizer_state.set_without_gradients,
    ),
    Fix(
        name="nan-norm",
        symptom="a gradient with NaN is applied, whatever grad_norm_skip_threshold says, and every weight is lost",
        cause="the norm is compared by `norm > threshold`, which is false for NaN",
        versions="0.19.2",
        remove_when="ChainedOptimizer.step skips a norm that is not finite",
        needed=nonfinite.nan_passes_the_threshold,
        apply=nonfinite.count_nan_as_infinite,
    ),
    Fix(
        name="selective-recompute",
        symptom="--recompute-modules moe_act or layernorm: NameError 'FP8GlobalStateManager' in the first step",
        cause="CheckpointWithoutOutput takes its default fp8=False for a wish and asks transformer-engine, which is "
              "not there; then it needs a compiler and ninja on every rank",
        versions="0.19.2",
        remove_when="CheckpointWithoutOutput() works without transformer-engine and without a compiler",
        needed=recompute.fp8_is_assumed,
        apply=recompute.do_without,
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
    Fix(
        name="rank-directories-step",
        symptom="--ckpt-step with rank directories and the distributed optimizer: the weights are those of that step, "
                "the optimizer's state and the iteration those of the last one, without a word",
        cause="load_checkpoint reads the tracker a second time for the optimizer's file, and forgets --ckpt-step",
        versions="0.19.2",
        remove_when="load_checkpoint takes the optimizer's file from the directory of the weights",
        needed=optimizer_state.tracker_is_read_again,
        apply=optimizer_state.let_the_tracker_say_ckpt_step,
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
