"""Where a run's weights come from: its own checkpoint, converted or Hugging Face weights, or nothing at all.

Random weights in place of those that were meant train as well, and nobody notices: so what names weights and holds none
is refused, with a sentence that says what is there. Only the first start of a run that saves into the directory that it
loads from finds nothing there by right. `training/arguments.py` asks, on every rank and before torch is imported.
"""

from pathlib import Path

from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.training.checkpoints import directory as saves
from megatron_mixtral.training.flags import EngineFlags, Flags
from megatron_mixtral.weights import directory as checkpoints

RANDOM = "random weights"


def weights_of(flags: Flags, given: EngineFlags) -> tuple[str, bool]:
    """(where the weights come from, as a sentence for the log; whether --hf-checkpoint is to be read).

    Raises `CheckpointError` or `ConfigError` where weights are named and are not there, or would be overwritten.
    """
    own = given.load is not None and given.save is not None and Path(given.load).resolve() == Path(given.save).resolve()
    if given.save is not None and not own and (found := checkpoints.iterations(Path(given.save))):
        last = checkpoints.name_of(found[-1])
        raise ConfigError(f"--save {given.save} holds checkpoints already, the last is {last}, and this run would "
                          f"overwrite them one by one: add --load {given.save} to go on from it, or another --save")
    if given.load is not None and (name := _chosen("--load", given.load, given.ckpt_step)):
        return _taken(given.load, name), False
    if flags.hf_checkpoint is not None:
        if given.pretrained_checkpoint:
            raise ConfigError("--hf-checkpoint and --pretrained-checkpoint both give starting weights; drop one of "
                              "them")
        _check_nothing_wanted(given)
        return f"Hugging Face weights {flags.hf_checkpoint}", True
    if given.pretrained_checkpoint:
        name = _chosen("--pretrained-checkpoint", given.pretrained_checkpoint, given.ckpt_step)
        if name is None:
            raise CheckpointError(f"--pretrained-checkpoint {given.pretrained_checkpoint}: "
                                  f"{_instead(given.pretrained_checkpoint)}, so there are no weights to start from")
        return _taken(given.pretrained_checkpoint, name), False
    _check_nothing_wanted(given)
    if given.load is not None:
        if given.finetune or not own:
            flag = "--finetune --load" if given.finetune else "--load"
            raise CheckpointError(
                f"{flag} {given.load}: {_instead(given.load)}, and training would begin with random weights: name the "
                f"directory that holds {checkpoints.TRACKER}, or drop {flag.split()[0]} if random weights are meant")
    return RANDOM, False


def _check_nothing_wanted(given: EngineFlags) -> None:
    if given.ckpt_step:
        where = given.load or given.pretrained_checkpoint
        raise CheckpointError(f"--ckpt-step {given.ckpt_step}: " + (_instead(where) if where else
                              "neither --load nor --pretrained-checkpoint names a directory with checkpoints"))


def _chosen(flag: str, path: str, step: int | None) -> str | None:
    """The name of the iteration that is loaded from a directory; None where it has no checkpoints."""
    directory = Path(path)
    # The draft first: rank 0 may be putting its tracker into place, and then one of the two is found.
    draft = saves.unfinished(directory)
    name = checkpoints.chosen(directory, step, None if draft is None else draft[1])
    if name is not None:
        return name
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{flag} {path} is a file; expected the directory that holds {checkpoints.TRACKER}")
    if checkpoints.is_iteration(directory.resolve()):
        whole, one = checkpoints.iteration_directory(directory.resolve())  # refuses one that is not there
        step = checkpoints.iteration_of(one.name)
        raise CheckpointError(f"{flag} {path} is one checkpoint of a directory: give {flag} {whole}"
                              + ("" if step is None else f" --ckpt-step {step}"))
    if (directory / "config.json").is_file() and any(any(directory.glob(pattern)) for pattern in _HF_WEIGHTS):
        raise CheckpointError(f"{flag} {path} holds a Hugging Face model: give it as --hf-checkpoint {path}")
    return None


_HF_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def _instead(path: str) -> str:
    return checkpoints.what_is_there(Path(path))


def _taken(directory: str, name: str) -> str:
    """What a run takes from a checkpoint directory: the engine loads converted weights without being told to."""
    if name == checkpoints.RELEASE:
        return f"weights of {directory}, converted, without an optimizer: begins at step 0"
    return f"checkpoint {directory}"
