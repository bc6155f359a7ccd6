"""A Megatron checkpoint directory: the names in it, which of its iterations is meant, and whose weights they are.

    DIR/latest_checkpointed_iteration.txt         the tracker: "release" for converted weights, else an iteration
    DIR/release/  or  DIR/iter_NNNNNNN/           rank directories, or the files of a distributed checkpoint
    DIR/mixtral_config.json                       what the model is; checkpoints of other programs have none
    DIR/tokenizer.model, generation_config.json, ...

Everybody who reads or writes such a directory takes its names from here. Imports no numpy and no torch.
"""

import re
from pathlib import Path, PurePath

from megatron_mixtral.config import CONFIG_FILE, MixtralConfig
from megatron_mixtral.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"

# What belongs to a model beside its weights and its config.json, in the names that are in use.
COMPANIONS = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
              "tokenizer.model.v3", "tekken.json", "vocab.json", "merges.txt",
              # InternLM2's own code, which its config.json names and transformers runs; nothing here does.
              "configuration_internlm2.py", "modeling_internlm2.py", "tokenization_internlm2.py",
              "tokenization_internlm2_fast.py")


def name_of(iteration: int | None) -> str:
    """The directory of an iteration; of converted weights, which have none, for None."""
    return RELEASE if iteration is None else f"iter_{iteration:07d}"


def iteration_of(name: str) -> int | None:
    """The iteration in the name of its directory; None for any other name."""
    match = re.fullmatch(r"iter_(\d{7,})", name)
    return None if match is None else int(match[1])


def iterations(directory: Path) -> list[int]:
    """Iterations of the checkpoints below `directory`, ascending; none where there is no such directory."""
    if not directory.is_dir():
        return []
    return sorted(number for path in directory.iterdir() if (number := iteration_of(path.name)) is not None)


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory has a tracker: the engine takes its latest iteration then."""
    return (directory / TRACKER).is_file()


def what_is_there(directory: Path) -> str:
    """The end of a sentence on a checkpoint that is not in `directory`: which ones are."""
    if not directory.is_dir():
        return f"{directory} is {'a file' if directory.exists() else 'not there'}"
    found = [str(iteration) for iteration in iterations(directory)]
    if (directory / RELEASE).is_dir():
        found.insert(0, RELEASE)
    if len(found) > 6:
        found = [*found[:2], "...", *found[-3:]]
    if not found:
        return f"there are no checkpoints in {directory}"
    *others, last = found
    return f"there are {', '.join(others)} and {last}" if others else f"there is {last}"


def latest(directory: Path) -> str | None:
    """The name of the directory that the tracker names; None without a tracker. Raises `CheckpointError`."""
    tracker = directory / TRACKER
    if not is_checkpoint(directory):
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text != RELEASE and not (text.isascii() and text.isdecimal()):
        raise CheckpointError(f"{tracker}: expected {RELEASE!r} or an iteration number, found {text[:40]!r}; "
                              f"{what_is_there(directory)}: write into it the one that is meant")
    return name_of(None if text == RELEASE else int(text))


def chosen(directory: Path, step: int | None = None, name: str | None = None) -> str | None:
    """The name of the iteration's directory that a run takes from a checkpoint directory: that of `step`
    (`--ckpt-step`), or else what the tracker names; or `name`, where the caller knows better. None where there are no
    checkpoints. Raises `CheckpointError` where they are, and it is not said which one, or that one is not there.
    """
    name = name or latest(directory)
    if name is None and iterations(directory):
        raise CheckpointError(f"{directory} has checkpoints, but no {TRACKER} that names one; "
                              f"{what_is_there(directory)}: write into this file the number of the one that is meant, "
                              "or give another directory")
    if step and name == RELEASE:
        raise CheckpointError(f"--ckpt-step {step}: {directory / TRACKER} means converted weights ({RELEASE}), and "
                              f"these would be loaded; {what_is_there(directory)}: drop the flag, or write {step} into "
                              "the file")
    if step and name:
        if not (directory / name_of(step)).is_dir():
            raise CheckpointError(f"--ckpt-step {step}: {_missing(directory, name_of(step))}")
        return name_of(step)
    if name is not None and not (directory / name).is_dir():
        raise CheckpointError(f"{directory / TRACKER} means {directory / name}, which does not exist; "
                              f"{what_is_there(directory)}: write into the file the one that is meant")
    return name


def iteration_directory(directory: Path) -> tuple[Path, Path]:
    """(checkpoint directory, directory of the iteration it points to). An iteration's directory may be given itself.

    Raises `CheckpointError` for an iteration that is not there, whether the tracker names it or the path does.
    """
    name = chosen(directory)
    if name is not None:
        return directory, directory / name
    if not directory.is_dir():
        raise CheckpointError(_missing(directory.parent, directory.name) if is_iteration(directory) else
                              f"{directory} does not exist or is not a directory")
    return directory.parent, directory


def is_iteration(directory: Path) -> bool:
    """Whether a path is called as the directory of an iteration is, or of converted weights beside a tracker."""
    return iteration_of(directory.name) is not None or (directory.name == RELEASE and is_checkpoint(directory.parent))


def _missing(directory: Path, name: str) -> str:
    return f"there is no {name} in {directory}; {what_is_there(directory)}"


def identity(directory: Path) -> MixtralConfig | None:
    """What the model is, where `mixtral_config.json` says it. Raises `ConfigError` for a file that cannot be read."""
    return MixtralConfig.from_checkpoint(directory) if (directory / CONFIG_FILE).exists() else None


def identity_files(config: MixtralConfig, iteration: int | None = None) -> dict[str, bytes]:
    """The files, by name, that make a directory with one iteration a checkpoint (of converted weights, for None)."""
    tracker = RELEASE if iteration is None else str(iteration)
    return {CONFIG_FILE: config.to_json().encode(), TRACKER: tracker.encode()}


def companions_of(directory: Path) -> list[Path]:
    """The tokenizer and generation files of a directory."""
    return [directory / name for name in COMPANIONS if (directory / name).is_file()]


def file_beside(directory: Path, name: object, where: str) -> Path:
    """The file that an index or metadata names, which must lie in the same folder; `where` begins the message.

    Raises `CheckpointError` where it lies elsewhere or does not exist.
    """
    if not isinstance(name, str) or PurePath(name).name != name or "\\" in name:
        raise CheckpointError(f"{where} points to {name!r}, expected a file name in the same folder")
    if not (directory / name).is_file():
        raise CheckpointError(f"{where} points to {name}, which does not exist in {directory}")
    return directory / name
