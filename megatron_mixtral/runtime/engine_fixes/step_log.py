"""The engine's log line of a step: its running sums, and the moment when a step is logged."""

import functools
import inspect
from typing import Any

from megatron_mixtral.runtime.replacements import Fix, Replacements


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


TRAINING_FIX = Fix(
    name="step-figures",
    symptom="with --log-interval 1 the second printed 'lm loss' is the mean of the first two steps",
    cause="training_log prints the first iteration of a run without resetting its running sums",
    versions="0.19.2",
    remove_when="training_log resets its sums whenever it prints, and calls something when a step is logged",
    needed=_first_log_keeps_its_sums,
    apply=_log_each_step_by_itself,
)
