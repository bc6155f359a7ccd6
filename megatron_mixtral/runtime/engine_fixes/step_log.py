"""The engine's log line of a step: its running sums, and the moment when a step is logged."""

import inspect
from typing import Any

from megatron_mixtral.runtime.replacements import Fix, around, source_has

_PLACE = "megatron.training.training:training_log"


def _log_each_step_by_itself(training_log: Any, *args: Any, **kwargs: Any) -> Any:
    from megatron.training.global_vars import get_args, get_tensorboard_writer

    if get_args().log_interval == 1:
        kwargs["is_first_iteration"] = False
    result = training_log(*args, **kwargs)
    # The engine has no place that is called once a step is logged; a writer that wants to know has this method.
    finish_step = getattr(get_tensorboard_writer(), "finish_step", None)
    if finish_step is not None:
        given = inspect.signature(training_log).bind(*args, **kwargs).arguments
        finish_step(skipped=bool(given["skipped_iter"]), loss_scale=float(given["loss_scale"]))
    return result


TRAINING_FIX = Fix(
    name="step-figures",
    symptom="with --log-interval 1 the second printed 'lm loss' is the mean of the first two steps",
    cause="training_log prints the first iteration of a run without resetting its running sums",
    versions="0.19.2",
    remove_when="training_log resets its sums whenever it prints, and calls something when a step is logged",
    needed=source_has(_PLACE, "should_reset = not is_first_iteration"),
    apply=around(_PLACE, _log_each_step_by_itself),
)
