"""What a resumed run does differently from the run that saved: said in sentences, or refused where it cannot be.

The position in the data is kept in samples, and so is the learning-rate schedule, whatever the batch. A setting of the
optimizer is what the run's flags say, unless `--use-checkpoint-opt_param-scheduler` keeps the schedule's
(`runtime/saving.py`). Plain values in, sentences out; `training/checkpoints/manager.py` calls it with the arguments
that the checkpoint carries.
"""

from typing import Any

from megatron_mixtral.errors import ConfigError

_AXES = (("tensor_model_parallel_size", "tp"), ("pipeline_model_parallel_size", "pp"),
         ("virtual_pipeline_model_parallel_size", "vpp"), ("expert_model_parallel_size", "ep"),
         ("expert_tensor_parallel_size", "etp"), ("context_parallel_size", "cp"), ("data_parallel_size", "dp"))
# The settings that the engine keeps in a checkpoint's schedule, and those that always come from the flags.
_LENGTHS = ("lr_decay_iters", "lr_decay_samples")
_WARM_UPS = ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction")
_KEPT = ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "lr_decay_style", *_LENGTHS, *_WARM_UPS, "weight_decay",
         "start_weight_decay", "end_weight_decay", "weight_decay_incr_style")
_FOLLOWED = ("lr_warmup_init", "lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples", "adam_beta1",
             "adam_beta2", "adam_eps", "sgd_momentum", "clip_grad")


def differences(saved: Any, now: Any) -> list[str]:
    """Sentences on layout, optimizer, batch, sequence length and data, where they are not those of the run that saved.

    `saved` and `now` are namespaces of the engine's arguments.
    """
    sentences = []
    replicas = bool(getattr(saved, "data_parallel_size", None))  # a converted checkpoint has no number of them
    before, after = (_layout(one, replicas) for one in (saved, now))
    if before != after:
        sentences.append(f"the layout was {before}, now it is {after}")
    consumed = getattr(saved, "consumed_train_samples", 0)
    if not _takes_optimizer(saved, now):
        if consumed:
            sentences.append("no optimizer state is taken over, so the learning-rate schedule begins anew, with its "
                             f"warm-up; the data go on after sample {consumed}")
    else:
        sentences += _settings(saved, now)
    if _changed(saved, now, "global_batch_size"):
        sentences.append(f"the global batch size was {saved.global_batch_size}, now it is {now.global_batch_size}: the "
                         f"data go on after sample {consumed}, and one step is {now.global_batch_size} samples")
    if _changed(saved, now, "seq_length"):
        sentences.append(f"the sequence length was {saved.seq_length}, now it is {now.seq_length}: samples are cut "
                         f"anew, so the position after sample {consumed} is another place in the text, and some of it "
                         "is read again or left out")
    for name in ("data_path", "split", "seed"):
        if _changed(saved, now, name):
            sentences.append(f"{_flag(name)} was {_words(getattr(saved, name))}, now it is "
                             f"{_words(getattr(now, name))}: other samples, of which {consumed} are skipped")
    before, after = (getattr(one, "data_identity", {}) for one in (saved, now))
    for prefix in sorted(before.keys() & after.keys()):
        if before[prefix] != after[prefix]:
            sentences.append(f"the data set {prefix} was written again with other contents (it was {before[prefix]}, "
                             f"now it is {after[prefix]}): other samples, of which {consumed} are skipped")
    return sentences


def _settings(saved: Any, now: Any) -> list[str]:
    """Which settings of the optimizer are the flags' and not the checkpoint's, and the other way round."""
    constant = all(getattr(one, "weight_decay_incr_style", "constant") == "constant" for one in (saved, now))
    changed = [name for name in (*_KEPT, *_FOLLOWED) if _changed(saved, now, name)
               and not (constant and name in ("start_weight_decay", "end_weight_decay"))]
    kept = [name for name in changed if now.use_checkpoint_opt_param_scheduler and name in _KEPT]
    sentences = []
    if followed := [name for name in changed if name not in kept]:
        sentences.append("the optimizer goes on with the settings of the flags: " + "; ".join(
            f"{_flag(name)} was {getattr(saved, name)}, now it is {getattr(now, name)}" for name in followed))
    if kept:
        sentences.append("--use-checkpoint-opt_param-scheduler keeps " + ", ".join(
            f"{_flag(name)} {getattr(saved, name)} (not {getattr(now, name)})" for name in kept))
    return sentences


def _takes_optimizer(saved: Any, now: Any) -> bool:
    return not (now.no_load_optim or getattr(saved, "no_save_optim", False))


def check_optimizer(saved: Any, now: Any) -> None:
    """`ConfigError` where the checkpoint holds the state of another kind of optimizer than this run's."""
    if not _takes_optimizer(saved, now):
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
    if getattr(now, "optimizer", None) == "sgd" and now.sgd_momentum and not getattr(saved, "sgd_momentum", 1):
        raise ConfigError("the checkpoint was saved with --sgd-momentum 0 and holds no momentum, this run has "
                          f"{now.sgd_momentum}: give 0, or --no-load-optim to begin with a new optimizer")


def check_schedule(saved: Any, now: Any, length_given: bool = False) -> None:
    """`ConfigError` where the length of the schedule or of its warm-up, in samples, changed as a consequence of other
    flags, and no flag says which of the two to follow. `length_given`: the run has an --lr-decay-iters of its own.
    """
    if now.override_opt_param_scheduler or now.use_checkpoint_opt_param_scheduler or not _takes_optimizer(saved, now):
        return
    choice = ("give --override-opt-param-scheduler to follow the new one, --use-checkpoint-opt-param-scheduler to keep "
              "the old one, or ")
    followed = length_given and any(_changed(saved, now, name) for name in _LENGTHS)
    before, after = _schedule_samples(saved), _schedule_samples(now)
    if None not in (before, after) and before != after and not followed:
        raise ConfigError(
            f"the learning-rate schedule was {before} samples long ({_steps(saved)} steps x {saved.global_batch_size})"
            f", now it would be {after} ({_steps(now)} x {now.global_batch_size}): {choice}an --lr-decay-iters and a "
            "--train-iters that make the same length")
    before, after = _warm_up_samples(saved), _warm_up_samples(now)
    if None not in (before, after) and before != after and not any(_changed(saved, now, name) for name in _WARM_UPS):
        raise ConfigError(
            f"the warm-up was {before} samples long ({saved.lr_warmup_iters} steps x {saved.global_batch_size}), now "
            f"it would be {after} ({now.lr_warmup_iters} x {now.global_batch_size}), which moves the whole schedule: "
            f"{choice}an --lr-warmup-iters that makes the same length")


def _warm_up_samples(args: Any) -> int | None:
    """Where --lr-warmup-iters says it."""
    steps = getattr(args, "lr_warmup_iters", None)
    if steps is None or getattr(args, "train_samples", None) or getattr(args, "lr_warmup_fraction", None) is not None:
        return None
    return steps * args.global_batch_size


def _schedule_samples(args: Any) -> int | None:
    if getattr(args, "train_samples", None):
        return getattr(args, "lr_decay_samples", None) or args.train_samples
    steps = _steps(args)
    return None if steps is None else steps * args.global_batch_size


def _steps(args: Any) -> int | None:
    return getattr(args, "lr_decay_iters", None) or getattr(args, "train_iters", None)


def _layout(args: Any, replicas: bool) -> str:
    sizes = ((short, getattr(args, name, None)) for name, short in _AXES if replicas or short != "dp")
    return " ".join(f"{short}{size}" for short, size in sizes if size and (size > 1 or short == "dp"))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _changed(saved: Any, now: Any, name: str) -> bool:
    return hasattr(saved, name) and getattr(saved, name) != getattr(now, name, None)


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
