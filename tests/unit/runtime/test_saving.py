"""The engine's saving, led past the checkpoint manager: failures of its writers of small files."""

from argparse import Namespace
from pathlib import Path

from helpers.ranks import run_ranks


def _cannot_write(rank: int, directory: str) -> tuple[list[str], list[str]]:
    """What the engine's writers of small files do where the directory is gone: (problems, what the manager heard)."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.core import CheckpointingConfig
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from torch.distributed.checkpoint.metadata import Metadata

    from megatron_mixtral.runtime import saving
    from megatron_mixtral.runtime.replacements import Replacements

    heard: list[str] = []
    seams = saving.Seams(Namespace(end=lambda iteration, folder, problem, background: heard.append(problem)))
    replacements = Replacements()
    seams.take_down_failures(replacements)
    serialization.save_config(CheckpointingConfig("torch_dist"), directory)
    FileSystemWriterAsync(directory).finish(Metadata({}), [])
    problems = list(seams.problems)
    seams.end(1, Path(directory), None, background=False)
    replacements.undo()
    return problems, heard


def test_rank_0_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    [(problems, heard)] = run_ranks(1, _cannot_write, str(tmp_path / "gone"))
    assert len(problems) == 2 and all("No such file or directory" in problem for problem in problems)
    assert heard == ["; ".join(problems)]
