"""Where the engine's saving and loading are led past the checkpoint manager.

The engine has no hook for this: it writes into the checkpoint's final directory, opens the tracker for writing (empty
until the write), and ends the run when a save fails. Here a save writes into a directory that the manager gives, and
the manager is told how it went, on all ranks together. `training/checkpoints/manager.py` has it.

Failures that all ranks learn of are survived. The engine shares those of writing tensors; those of the small files that
rank 0 alone writes are taken down here, because the other ranks would wait for it in a collective.
"""

import os
from collections import deque
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.training import checkpointing, training, wandb_utils
from megatron.training.global_vars import get_args
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.runtime.replacements import Replacements


def lead_through(replacements: Replacements, manager: Any) -> None:
    """Lead the engine's saves and loads past `manager`, in this process."""
    seams = Seams(manager)
    replacements.wrap(training, "save_checkpoint", seams.save)
    # The engine tells W&B before the checkpoint has its name.
    replacements.set(wandb_utils, "on_save_checkpoint_success", lambda *args, **kwargs: None)
    replacements.wrap(checkpointing, "schedule_async_save", seams.schedule)
    replacements.wrap(training, "maybe_finalize_async_save", seams.finalize)
    replacements.wrap(checkpointing, "get_checkpoint_name", seams.name)
    replacements.wrap(checkpointing, "get_checkpoint_tracker_filename", seams.tracker)
    seams.take_down_failures(replacements)
    replacements.wrap(training, "load_checkpoint", seams.load)
    replacements.wrap(checkpointing, "check_checkpoint_args", seams.compare)


class Seams:
    """What answers in the engine's places, each given the engine's own function first; and the saves under way.

    Where `folder` is set, the engine is in a save's synchronous part.
    """

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self.folder: Path | None = None
        self.iteration = 0
        self.problems: list[str] = []  # of this rank's small files
        self.background: deque[tuple[int, Path]] = deque()
        self._tell_wandb = wandb_utils.on_save_checkpoint_success
        self._tracker_of = checkpointing.get_checkpoint_tracker_filename

    # -- saving ----------------------------------------------------------------------------------------

    def save(self, save_checkpoint: Any, iteration: int, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("non_persistent_ckpt"):
            return save_checkpoint(iteration, *args, **kwargs)
        folder, problem = self.manager.begin(iteration), None
        if folder is None:
            return None
        self.folder, self.iteration = folder, iteration
        try:
            save_checkpoint(iteration, *args, **kwargs)
        except CheckpointException as error:
            problem = _reason(error)
        finally:
            self.folder = None
        if not get_args().async_save:
            self.end(iteration, folder, problem, background=False)
        return None

    def end(self, iteration: int, folder: Path, problem: str | None, background: bool) -> None:
        found, self.problems = [*([] if problem is None else [problem]), *self.problems], []
        published = self.manager.end(iteration, folder, "; ".join(found) if found else None, background)
        if published is not None:
            save = str(published.parent)
            self._tell_wandb(str(published), self._tracker_of(save), save, iteration)

    def schedule(self, schedule_async_save: Any, request: Any) -> None:
        iteration, folder = self.iteration, self.folder
        assert folder is not None, "a save is scheduled while it is prepared"
        if request.async_fn is not None:  # this rank has something to write
            request = request._replace(async_fn=self.manager.background(request.async_fn, folder, iteration))
        request.add_finalize_fn(lambda: self._finished(None))
        self.background.append((iteration, folder))
        schedule_async_save(request)

    def finalize(self, maybe_finalize_async_save: Any, *args: Any, **kwargs: Any) -> None:
        while True:
            try:
                return maybe_finalize_async_save(*args, **kwargs)
            except CheckpointException as error:  # raised on all ranks; those behind it are not finished yet
                self._finished(_reason(error))

    def _finished(self, problem: str | None) -> None:
        iteration, folder = self.background.popleft()
        self.end(iteration, folder, problem, background=True)

    def name(self, get_checkpoint_name: Any, directory: Any, *args: Any, **kwargs: Any) -> Any:
        return get_checkpoint_name(directory if self.folder is None else str(self.folder), *args, **kwargs)

    def tracker(self, get_checkpoint_tracker_filename: Any, directory: Any) -> Any:
        # The manager replaces the tracker; what the engine writes goes nowhere, which cannot fail either.
        return get_checkpoint_tracker_filename(directory) if self.folder is None else os.devnull

    def take_down_failures(self, replacements: Replacements) -> None:
        """Let the small files that rank 0 writes fail without a word to the engine."""
        def taken_down(function: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except OSError as error:
                self.problems.append(str(error))
                return None

        replacements.wrap(FileSystemWriterAsync, "finish", taken_down)
        replacements.wrap(serialization, "save_config", taken_down)

    # -- loading ---------------------------------------------------------------------------------------

    def load(self, load_checkpoint: Any, model: Any, optimizer: Any, scheduler: Any, load_arg: str = "load",
             **kwargs: Any) -> Any:
        args = get_args()
        if load_arg == "load" and not checkpointing.checkpoint_exists(args.load) and args.pretrained_checkpoint:
            load_arg = "pretrained_checkpoint"  # as the engine does
        directory = Path(getattr(args, load_arg) or "")
        if checkpointing.checkpoint_exists(getattr(args, load_arg)):
            directory = Path(checkpointing.get_load_checkpoint_path_by_args(args, load_arg))
            weights_only = args.finetune or load_arg == "pretrained_checkpoint" or directory.name == "release"
            self.manager.before_load(directory, not weights_only)
        _choose_settings(optimizer, scheduler)
        try:
            loaded = load_checkpoint(model, optimizer, scheduler, load_arg=load_arg, **kwargs)
        except SystemExit as end:  # the engine's way out where it cannot read a file: with status 0
            raise CheckpointError(f"{directory} could not be loaded; what the engine found is printed above") from end
        if scheduler is not None:
            scheduler.step(0)  # the engine sets the weight decay of the next step before it has read how it goes on
        return loaded

    def compare(self, check_checkpoint_args: Any, saved: Any, *args: Any, **kwargs: Any) -> None:
        check_checkpoint_args(saved, *args, **kwargs)
        self.manager.loaded_arguments(saved)


def _choose_settings(optimizer: Any, scheduler: Any) -> None:
    """Whose settings a run goes on with, before its state is loaded: its own, or with
    `--use-checkpoint-opt_param-scheduler` the checkpoint's, where they are the schedule's. The engine's third way, an
    assertion that they are equal, says too little; what is doubtful the manager has refused (`before_load`).
    """
    if scheduler is None:
        return
    scheduler.override_opt_param_scheduler = not scheduler.use_checkpoint_opt_param_scheduler
    if scheduler.use_checkpoint_opt_param_scheduler:
        optimizer.kept_settings = ("max_lr", "min_lr")  # see engine_fixes/optimizer_load.py


def _reason(error: CheckpointException) -> str:
    """What failed on which rank; rank 0 knows, elsewhere it is empty."""
    return "; ".join(f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items())
