"""What a resumed run does differently from the run that saved: said in sentences, or refused where it cannot be.

The position in the data is kept in samples, and so is the learning-rate schedule, whatever the batch. Plain values in,
sentences out; `training/checkpoints/manager.py` calls it with the arguments that the checkpoint carries.
"""

from typing import Any

from megatron_mixtral.errors import ConfigError

_AXES = (("tensor_model_parallel_size", "tp"), ("pipeline_model_parallel_size", "pp"),
         ("virtual_pipeline_model_parallel_size", "vpp"), ("expert_model_parallel_size", "ep"),
         ("expert_tensor_parallel_size", "etp"), ("context_parallel_size", "cp"), ("data_parallel_size", "dp"))


def differences(saved: Any, now: Any) -> list[str]:
    """Sentences on layout, batch, sequence length and data, where they are not those of the run that saved.

    `saved` and `now` are namespaces of the engine's arguments.
    """
    sentences = []
    before, after = (_layout(one) for one in (saved, now))
    if before != after:
        sentences.append(f"the layout was {before}, now it is {after}")
    consumed = getattr(saved, "consumed_train_samples", 0)
    if consumed and (now.no_load_optim or getattr(saved, "no_save_optim", False)):
        sentences.append("no optimizer state is taken over, so the learning-rate schedule begins anew, with its "
                         f"warm-up; the data go on after sample {consumed}")
    if _changed(saved, now, "global_batch_size"):
        sentences.append(f"the global batch size was {saved.global_batch_size}, now it is {now.global_batch_size}: the "
                         f"data go on after sample {consumed}, and one step is {now.global_batch_size} samples")
    if _changed(saved, now, "seq_length"):
        sentences.append(f"the sequence length was {saved.seq_length}, now it is {now.seq_length}: samples are cut "
                         f"anew, so the position after sample {consumed} is another place in the text, and some of it "
                         "is read again or left out")
    for name in ("data_path", "split", "seed"):
        if _changed(saved, now, name):
            sentences.append(f"--{name.replace('_', '-')} was {_words(getattr(saved, name))}, now it is "
                             f"{_words(getattr(now, name))}: other samples, of which {consumed} are skipped")
    return sentences


def check_optimizer(saved: Any, now: Any) -> None:
    """`ConfigError` where the checkpoint holds the state of another kind of optimizer than this run's."""
    if now.no_load_optim or getattr(saved, "no_save_optim", False):
        return
    if _changed(saved, now, "use_distributed_optimizer"):
        was, now_is, what = "without", "with", "leave it out"
        if saved.use_distributed_optimizer:
            was, now_is, what = now_is, was, "add it"
        raise ConfigError(
            f"the checkpoint was saved {was} --use-distributed-optimizer, this run is {now_is} it, and the optimizer's "
            f"state has another form: {what} to go on, or give --no-load-optim to begin with a new optimizer")
    if _changed(saved, now, "optimizer"):
        raise ConfigError(
            f"the checkpoint holds the state of --optimizer {saved.optimizer}, the run's is {now.optimizer}: give the "
            "same, or --no-load-optim to begin with a new optimizer")


def check_schedule(saved: Any, now: Any) -> None:
    """`ConfigError` where the schedule's length in samples changed and no flag says which of the two to follow."""
    if now.override_opt_param_scheduler or now.use_checkpoint_opt_param_scheduler or now.no_load_optim:
        return
    before, after = _schedule_samples(saved), _schedule_samples(now)
    if None in (before, after) or before == after:
        return
    raise ConfigError(
        f"the learning-rate schedule was {before} samples long ({_steps(saved)} steps x {saved.global_batch_size}), "
        f"now it would be {after} ({_steps(now)} x {now.global_batch_size}): give --override-opt-param-scheduler to "
        "follow the new one, --use-checkpoint-opt-param-scheduler to keep the old one, or an --lr-decay-iters and a "
        "--train-iters that make the same length")


def _schedule_samples(args: Any) -> int | None:
    if getattr(args, "train_samples", None):
        return getattr(args, "lr_decay_samples", None) or args.train_samples
    steps = _steps(args)
    return None if steps is None else steps * args.global_batch_size


def _steps(args: Any) -> int | None:
    return getattr(args, "lr_decay_iters", None) or getattr(args, "train_iters", None)


def _layout(args: Any) -> str:
    sizes = ((short, getattr(args, name, None)) for name, short in _AXES)
    return " ".join(f"{short}{size}" for short, size in sizes if size and (size > 1 or short == "dp"))


def _changed(saved: Any, now: Any, name: str) -> bool:
    return hasattr(saved, name) and getattr(saved, name) != getattr(now, name)


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
