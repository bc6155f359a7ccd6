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
              "tokenizer.model.v3", "tekken.json", "vocab.json", "merges.txt")


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


def latest(directory: Path) -> str | None:
    """The name of the directory that the tracker names; None without a tracker. Raises `CheckpointError`."""
    tracker = directory / TRACKER
    if not is_checkpoint(directory):
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text != RELEASE and not text.isdecimal():
        raise CheckpointError(f"{tracker}: expected {RELEASE!r} or an iteration number, found {text[:40]!r}")
    return name_of(None if text == RELEASE else int(text))


def iteration_directory(directory: Path) -> tuple[Path, Path]:
    """(checkpoint directory, directory of the iteration it points to). An iteration's directory may be given itself.

    Raises `CheckpointError` for a tracker that names what is not there.
    """
    name = latest(directory)
    if name is None:
        return directory.parent, directory
    if not (directory / name).is_dir():
        raise CheckpointError(f"{directory / TRACKER} means {directory / name}, which does not exist")
    return directory, directory / name


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
