"""The engine's arguments that a checkpoint carries, read without its tensors, before a load."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_mixtral.config import engine
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.files import MappedFiles, load_torch
from megatron_mixtral.weights.formats.dist_metadata import COMMON, COMMON_FILE, METADATA_FILE, Contents, read_contents
from megatron_mixtral.weights.formats.rank_source import RankDirSource


def common_state(directory: Path, contents: Contents) -> tuple[dict[str, Any], str]:
    """What a distributed checkpoint keeps once for all ranks, tensors as records, and where it was read; empty where
    there is none. Raises `CheckpointError`.
    """
    region, path = contents.objects.get(COMMON), directory / COMMON_FILE
    if region is not None:
        where = f"{region.file} ({COMMON})"
        common = load_torch(MappedFiles()[region.file], where, region.offset, region.length)
        common = common[0] if isinstance(common, list) and common else common
    elif path.is_file():
        where, common = str(path), load_torch(MappedFiles()[path], str(path))
    else:
        where, common = str(directory), {}
    return (common if isinstance(common, dict) else {}), where


def saved_arguments(directory: Path, run: Namespace) -> Namespace | None:
    """The arguments in one iteration's directory, of either form; None where it has none.

    `CheckpointError` for another model than that of `run` (the engine's arguments), for rank directories of another
    layout, and for those that lack a file. The engine compares little of the model, and not all of the layout: with
    another number of virtual stages it would go on with random weights, and where it does not find a file it ends with
    status 0.
    """
    if (directory / METADATA_FILE).is_file():
        common, where = common_state(directory, read_contents(directory))
        saved = common.get("args")
    else:
        source, layout = RankDirSource(directory), engine.layout_from_args(run, "this run")
        if source.layout != layout:
            raise CheckpointError(
                f"{directory} holds rank directories of layout {source.layout}, the run is {layout}: they are read by "
                "the layout that they were written for. Give its sizes, or write them anew for this one with "
                "tools/checkpoint/util.py (weights only; a distributed checkpoint, --ckpt-format torch_dist, goes on "
                "in any layout)")
        for coord in layout.coords():
            source.file(coord)
        saved, where = source.args, str(directory)
    if saved is not None:
        engine.check_saved(saved, engine.config_from_args(run, "this run"), where, "the run")
    return saved
