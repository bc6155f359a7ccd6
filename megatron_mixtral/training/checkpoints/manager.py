"""What becomes of a run's checkpoints: published whole, summed, kept or removed, exported; and what a failure costs.

`CheckpointManager` answers the engine through `runtime/saving.py`; every method is called on all ranks at the same
point. Rank 0 acts on the directory, the others learn how it went.
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
from megatron_mixtral.training import adapters
from megatron_mixtral.training.checkpoints import resume
from megatron_mixtral.training.checkpoints.export import Exporter
from megatron_mixtral.training.checkpoints.lease import Lease
from megatron_mixtral.weights import directory as names
from megatron_mixtral.weights import saved_arguments

logger = logging.getLogger(__name__)


class CheckpointManager:
    """The checkpoints of one run. Made before torch.distributed is initialised, called after."""

    def __init__(self, args: Namespace, held: Lease | None = None) -> None:
        """`args` are the engine's, with `Flags` among them; `held` is the lease of --save, on rank 0."""
        self._held = held
        self._args, self._save = args, Path(args.save) if args.save else None
        self._multiples = args.save_retain_interval
        args.save_retain_interval = None  # the engine would look for the one to remove in the tracker
        # The engine puts its own length into the arguments later.
        self._length_given = any(getattr(args, name, None) for name in ("lr_decay_iters", "lr_decay_samples"))
        self.unsaved: str | None = None  # why the last save failed
        if args.rank == 0 and args.load and not names.is_checkpoint(Path(args.load)):
            saves.finish(Path(args.load))
        if self._save is not None and args.rank == 0:
            self._save.mkdir(parents=True, exist_ok=True)
            saves.tidy(self._save)
            template = Path(args.hf_checkpoint) if args.hf_checkpoint else None
            self._exporter = Exporter(self._save, args.export_hf_interval, template, args.adapter_format)

    # -- saving ----------------------------------------------------------------------------------------

    def begin(self, iteration: int) -> Path | None:
        """A draft directory, the same on all ranks; None, with a report, where it cannot be made."""
        try:
            return self._on_rank_0(lambda: self._draft(iteration))
        except OSError as error:
            self._report(iteration, str(error))
            return None

    def _draft(self, iteration: int) -> Path:
        if self._held is not None:
            self._held.check()
        return saves.draft(self._save, iteration)

    def background(self, write: Callable[..., Any], folder: Path, iteration: int) -> Callable[..., Any]:
        """`write`, and the sums of what it wrote, for the background process; can be pickled."""
        return partial(integrity.write_then_sum, write, folder / saves.name_of(iteration), self._args.rank)

    def end(self, iteration: int, folder: Path, problem: str | None, background: bool) -> Path | None:
        """Publish a draft that every rank has written, else discard it (`problem`: why this rank has not). The
        checkpoint's directory, or None.
        """
        if problem is None and not background:
            try:
                integrity.sum_share(folder / saves.name_of(iteration), self._args.rank)
            except OSError as error:
                problem = str(error)
        problems = sorted({one for one in _from_all(problem) if one is not None})
        if not problems:
            try:
                published = self._on_rank_0(lambda: self._publish(iteration, folder))
            except OSError as error:
                problems = [str(error)]
        if problems:
            self._report(iteration, "; ".join(filter(None, problems)))
            if self._args.rank == 0:
                saves.discard(folder)
            return None
        self.unsaved = None
        if self._args.rank == 0:
            self._after(iteration, published)
        return published

    def _publish(self, iteration: int, folder: Path) -> Path:
        integrity.write_manifest(folder / saves.name_of(iteration))
        if self._held is not None:
            self._held.check()
        return saves.publish(folder, self._save, iteration)

    def _after(self, iteration: int, published: Path) -> None:
        logger.info("saved %s", published)
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
        """Refuse at once what would be found late or never: another layout of rank directories, another optimizer (if
        not only weights are to be loaded, but the `whole`). Without --no-verify-checkpoint, compare every file with its
        sum, the ranks in parallel.
        """
        self._on_rank_0(lambda: self._compare(directory, whole))
        if not self._args.no_verify_checkpoint:
            self._verify(directory)

    def _compare(self, directory: Path, whole: bool) -> None:
        saved = saved_arguments(directory, self._args)
        if saved is not None:
            adapters.check_saved(saved, self._args, directory)
        if whole and saved is not None:
            resume.check_optimizer(saved, self._args)
            resume.check_schedule(saved, self._args, self._length_given)

    def _verify(self, directory: Path) -> None:
        try:
            sums = self._on_rank_0(lambda: integrity.read_manifest(directory))
        except integrity.NoSumsError as error:
            if self._args.verify_checkpoint:
                raise CheckpointError(f"--verify-checkpoint: {error}; drop the flag to load it all the same") from None
            if self._args.rank == 0:
                logger.info("%s", error)
            return
        found = integrity.damage(directory, sums, self._args.rank, self._args.world_size)
        damage = sorted(one for share in _from_all(found) for one in share)
        if damage:
            raise CheckpointError(f"{directory} is damaged: {'; '.join(damage)}. Give --ckpt-step with the iteration "
                                  "of another checkpoint, restore the files, or load them as they are with "
                                  "--no-verify-checkpoint")
        if self._args.rank == 0:
            logger.info("%s: %d files are as they were written", directory, len(sums))

    def loaded_arguments(self, saved: Any) -> None:
        """Say what is different from the run that saved."""
        sentences = resume.differences(saved, self._args)
        if self._args.rank == 0:
            for sentence in sentences:
                logger.info("resume: %s", sentence)

    def _on_rank_0(self, act: Callable[[], Any]) -> Any:
        """What rank 0 gets from `act`, or raises there, on every rank."""
        import torch.distributed as dist

        outcome: list[Any] = [None, None]
        if self._args.rank == 0:
            try:
                outcome[0] = act()
            except (MixtralError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def _space(directory: Path) -> str:
    try:
        return f"{human_size(free_space(directory))} free on the disk"
    except OSError as error:
        return str(error)


def _from_all(value: Any) -> list[Any]:
    import torch.distributed as dist

    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
