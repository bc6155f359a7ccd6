"""What becomes of a run's checkpoints: published whole, summed, kept or removed, exported; and what a failure costs.

`CheckpointManager` answers the engine through `runtime/saving.py`; all of its methods run on all ranks. Rank 0 acts on
the directory, the others learn how it went.
"""

import logging
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import megatron_mixtral.training.checkpoints.directory as saves
import megatron_mixtral.training.checkpoints.integrity as integrity
from megatron_mixtral.disk import free_space, human_size
from megatron_mixtral.errors import CheckpointError, MixtralError
from megatron_mixtral.training.checkpoints import resume
from megatron_mixtral.training.checkpoints.export import Exporter
from megatron_mixtral.weights import saved_arguments

logger = logging.getLogger(__name__)


class CheckpointManager:
    """The checkpoints of one run. Made before torch.distributed is initialised, called after."""

    def __init__(self, args: Namespace) -> None:
        """`args` are the engine's, with `Flags` among them."""
        self._args, self._save = args, Path(args.save) if args.save else None
        self._multiples = args.save_retain_interval
        args.save_retain_interval = None  # the engine would look for the one to remove in the tracker
        self.unsaved: str | None = None  # why the last save failed
        if self._save is not None and args.rank == 0:
            self._save.mkdir(parents=True, exist_ok=True)
            saves.tidy(self._save)
            template = Path(args.hf_checkpoint) if args.hf_checkpoint else None
            self._exporter = Exporter(self._save, args.export_hf_interval, template)

    # -- saving ----------------------------------------------------------------------------------------

    def begin(self, iteration: int) -> Path | None:
        """A draft directory, the same on all ranks; None, with a report, where it cannot be made."""
        folder, problem = None, None
        if self._args.rank == 0:
            try:
                folder = saves.draft(self._save, iteration)
            except OSError as error:
                problem = str(error)
        folder, problem = _from_rank_0((folder, problem))
        if problem is not None:
            self._report(iteration, problem)
        return folder

    def background(self, write: Callable[..., Any], folder: Path, iteration: int) -> Callable[..., Any]:
        """`write`, and the sums of what it wrote, for the background process."""
        return partial(integrity.write_then_sum, write, folder / saves.name_of(iteration), self._args.rank)

    def end(self, iteration: int, folder: Path, problem: str | None, background: bool) -> Path | None:
        """Publish a draft that every rank has written, else discard it. The checkpoint's directory, or None."""
        if problem is None and not background:
            try:
                integrity.sum_share(folder / saves.name_of(iteration), self._args.rank)
            except OSError as error:
                problem = str(error)
        problems = sorted({one for one in _from_all(problem) if one is not None})
        published = None
        if self._args.rank == 0 and not problems:
            try:
                integrity.write_manifest(folder / saves.name_of(iteration))
                published = saves.publish(folder, self._save, iteration)
            except OSError as error:
                problems = [str(error)]
        published, problems = _from_rank_0((published, problems))
        if problems:
            self._report(iteration, "; ".join(filter(None, problems)))
            if self._args.rank == 0:
                saves.discard(folder)
            return None
        self.unsaved = None
        if self._args.rank == 0:
            self._after(iteration, published)
        return published

    def _after(self, iteration: int, published: Path) -> None:
        self._exporter.start(iteration, published)
        doomed = saves.surplus(saves.iterations(self._save), iteration, self._args.save_total_limit,
                                   self._multiples, self._exporter.busy())
        for one in doomed:
            try:
                saves.remove(self._save, one)
            except OSError as error:
                logger.warning("checkpoint of step %d cannot be removed: %s", one, error)

    def _report(self, iteration: int, problem: str) -> None:
        """Say that a save failed and what is left; the run goes on."""
        self.unsaved = f"the checkpoint of step {iteration} could not be saved: {problem}"
        if self._args.rank == 0:
            whole = saves.iterations(self._save)
            left = f"the last whole checkpoint is that of step {whole[-1]}" if whole else "nothing is saved yet"
            logger.error("%s (%s). Training goes on; %s", self.unsaved, _space(self._save), left)

    def close(self) -> None:
        """The run is over: wait for exports. `CheckpointError` where its last state is not saved."""
        if self._save is not None and self._args.rank == 0:
            self._exporter.wait()
        if self.unsaved is not None:
            raise CheckpointError(f"{self.unsaved}; the run's last steps are lost. The same command repeats them")

    # -- loading ---------------------------------------------------------------------------------------

    def before_load(self, directory: Path, whole: bool) -> None:
        """Refuse at once what would be found late or never: another layout of rank directories, another optimizer.
        With --verify-checkpoint, compare every file with its sum, the ranks in parallel.
        """
        problem = None
        if self._args.rank == 0:
            try:
                saved = saved_arguments(directory, self._args)
                if whole and saved is not None:
                    resume.check_optimizer(saved, self._args)
                    resume.check_schedule(saved, self._args)
            except MixtralError as error:
                problem = error
        problem = _from_rank_0(problem)
        if problem is not None:
            raise problem
        if self._args.verify_checkpoint:
            self._verify(directory)

    def _verify(self, directory: Path) -> None:
        try:
            sums, problem = integrity.read_manifest(directory), None
        except CheckpointError as error:
            sums, problem = {}, str(error)
        problem = _from_rank_0(problem)
        if problem is not None:
            raise CheckpointError(problem)
        found = integrity.damage(directory, sums, self._args.rank, self._args.world_size)
        damage = sorted(one for share in _from_all(found) for one in share)
        if damage:
            raise CheckpointError(f"{directory} is damaged: {'; '.join(damage)}. Give --ckpt-step with the iteration "
                                  "of another checkpoint, or restore the files")
        if self._args.rank == 0:
            logger.info("%s: %d files are as they were written", directory, len(sums))

    def loaded_arguments(self, saved: Any) -> None:
        """Say what is different from the run that saved."""
        sentences = resume.differences(saved, self._args)
        if self._args.rank == 0:
            for sentence in sentences:
                logger.info("resume: %s", sentence)


def _space(directory: Path) -> str:
    try:
        return f"{human_size(free_space(directory))} free on the disk"
    except OSError as error:
        return str(error)


def _from_rank_0(value: Any) -> Any:
    import torch.distributed as dist

    carrier = [value]
    dist.broadcast_object_list(carrier, src=0)
    return carrier[0]


def _from_all(value: Any) -> list[Any]:
    import torch.distributed as dist

    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
