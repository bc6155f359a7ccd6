"""Where the engine's saving and loading are led past the checkpoint manager.

The engine has no hook for this: it writes into the checkpoint's final directory, opens the tracker for writing (empty
until the write), and ends the run when a save fails. Here a save writes into a directory that the manager gives, and
the manager is told how it went, on all ranks together. `training/checkpoints/manager.py` has it.

Failures that all ranks learn of are survived. The engine shares those of writing tensors; those of the small files that
rank 0 alone writes are taken down here, because the other ranks would wait for it in a collective.
"""

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch.distributed.checkpoint.api import CheckpointException

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.runtime.replacements import Replacements


class CheckpointManager(Protocol):
    """What decides about checkpoints. Every method is called on all ranks at the same point."""

    def begin(self, iteration: int) -> Path | None:
        """An empty directory on all ranks for `iter_NNNNNNN`; None: it cannot be saved now."""

    def background(self, write: Callable[..., Any], folder: Path, iteration: int) -> Callable[..., Any]:
        """What the background process of an asynchronous save calls in place of `write`; can be pickled."""

    def end(self, iteration: int, folder: Path, problem: str | None, background: bool) -> Path | None:
        """The save was written, or failed (`problem` is not None); returns the checkpoint's directory if it has one."""

    def before_load(self, directory: Path, whole: bool) -> None:
        """A checkpoint is about to be loaded: `whole`, or its weights only."""

    def loaded_arguments(self, saved: Any) -> None:
        """The arguments of the run that wrote the checkpoint that is being loaded."""


class _Saves:
    """The saves under way. Where `folder` is set, the engine is in a save's synchronous part."""

    def __init__(self, manager: CheckpointManager) -> None:
        self.manager = manager
        self.folder: Path | None = None
        self.iteration = 0
        self.problems: list[str] = []  # of this rank's small files
        self.background: deque[tuple[int, Path]] = deque()

    @contextlib.contextmanager
    def into(self, folder: Path, iteration: int) -> Iterator[None]:
        self.folder, self.iteration = folder, iteration
        try:
            yield
        finally:
            self.folder = None

    def end(self, iteration: int, folder: Path, problem: str | None, background: bool) -> Path | None:
        found, self.problems = [*([] if problem is None else [problem]), *self.problems], []
        return self.manager.end(iteration, folder, "; ".join(found) if found else None, background)


def _reason(error: CheckpointException) -> str:
    """What failed on which rank; rank 0 knows, elsewhere it is empty."""
    return "; ".join(f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items())


def lead_through(replacements: Replacements, manager: CheckpointManager) -> None:
    """Lead the engine's saves and loads past `manager`, in this process."""
    saves = _Saves(manager)
    _lead_saves(replacements, saves)
    _lead_background_saves(replacements, saves)
    _lead_names(replacements, saves)
    _take_down_failures(replacements, saves)
    _lead_loads(replacements, manager)


def _lead_saves(replacements: Replacements, saves: _Saves) -> None:
    from megatron.training import training, wandb_utils
    from megatron.training.checkpointing import get_checkpoint_tracker_filename
    from megatron.training.global_vars import get_args

    original, tell_wandb = training.save_checkpoint, wandb_utils.on_save_checkpoint_success

    @functools.wraps(original)
    def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("non_persistent_ckpt"):
            return original(iteration, *args, **kwargs)
        folder, problem = saves.manager.begin(iteration), None
        if folder is None:
            return None
        with saves.into(folder, iteration):
            try:
                original(iteration, *args, **kwargs)
            except CheckpointException as error:
                problem = _reason(error)
        if not get_args().async_save:
            announce(iteration, saves.end(iteration, folder, problem, background=False))
        return None

    def announce(iteration: int, published: Path | None) -> None:
        if published is not None:
            save = str(published.parent)
            tell_wandb(str(published), get_checkpoint_tracker_filename(save), save, iteration)

    saves.announce = announce
    replacements.set(training, "save_checkpoint", save_checkpoint)
    # The engine tells W&B before the checkpoint has its name.
    replacements.set(wandb_utils, "on_save_checkpoint_success", lambda *args, **kwargs: None)


def _lead_background_saves(replacements: Replacements, saves: _Saves) -> None:
    from megatron.training import async_utils, checkpointing, training

    schedule, finalize = checkpointing.schedule_async_save, async_utils.maybe_finalize_async_save

    def schedule_async_save(request: Any) -> None:
        iteration, folder = saves.iteration, saves.folder
        assert folder is not None, "a save is scheduled while it is prepared"
        if request.async_fn is not None:  # this rank has something to write
            request = request._replace(async_fn=saves.manager.background(request.async_fn, folder, iteration))
        request.add_finalize_fn(lambda: finished(None))
        saves.background.append((iteration, folder))
        schedule(request)

    def finished(problem: str | None) -> None:
        iteration, folder = saves.background.popleft()
        saves.announce(iteration, saves.end(iteration, folder, problem, background=True))

    @functools.wraps(finalize)
    def maybe_finalize_async_save(*args: Any, **kwargs: Any) -> None:
        while True:
            try:
                return finalize(*args, **kwargs)
            except CheckpointException as error:  # raised on all ranks; those behind it are not finished yet
                finished(_reason(error))

    replacements.set(checkpointing, "schedule_async_save", schedule_async_save)
    replacements.set(training, "maybe_finalize_async_save", maybe_finalize_async_save)


def _lead_names(replacements: Replacements, saves: _Saves) -> None:
    from megatron.training import checkpointing

    name, tracker = checkpointing.get_checkpoint_name, checkpointing.get_checkpoint_tracker_filename

    @functools.wraps(name)
    def get_checkpoint_name(directory: Any, *args: Any, **kwargs: Any) -> Any:
        return name(directory if saves.folder is None else str(saves.folder), *args, **kwargs)

    @functools.wraps(tracker)
    def get_checkpoint_tracker_filename(directory: Any) -> Any:
        # The manager replaces the tracker; what the engine writes goes nowhere, which cannot fail either.
        return tracker(directory) if saves.folder is None else os.devnull

    replacements.set(checkpointing, "get_checkpoint_name", get_checkpoint_name)
    replacements.set(checkpointing, "get_checkpoint_tracker_filename", get_checkpoint_tracker_filename)


def _take_down_failures(replacements: Replacements, saves: _Saves) -> None:
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def taken_down(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except OSError as error:
                saves.problems.append(str(error))
                return None

        return call

    replacements.set(FileSystemWriterAsync, "finish", taken_down(FileSystemWriterAsync.finish))
    replacements.set(serialization, "save_config", taken_down(serialization.save_config))


def _lead_loads(replacements: Replacements, manager: CheckpointManager) -> None:
    from megatron.training import checkpointing, training
    from megatron.training.global_vars import get_args

    load, compare = training.load_checkpoint, checkpointing.check_checkpoint_args

    @functools.wraps(load)
    def load_checkpoint(model: Any, optimizer: Any, scheduler: Any, load_arg: str = "load", **kwargs: Any) -> Any:
        args = get_args()
        if load_arg == "load" and not checkpointing.checkpoint_exists(args.load) and args.pretrained_checkpoint:
            load_arg = "pretrained_checkpoint"  # as the engine does
        directory = Path(getattr(args, load_arg) or "")
        if checkpointing.checkpoint_exists(getattr(args, load_arg)):
            directory = Path(checkpointing.get_load_checkpoint_path_by_args(args, load_arg))
            weights_only = args.finetune or load_arg == "pretrained_checkpoint" or directory.name == "release"
            manager.before_load(directory, not weights_only)
        try:
            return load(model, optimizer, scheduler, load_arg=load_arg, **kwargs)
        except SystemExit as end:  # the engine's way out where it cannot read a file: with status 0
            raise CheckpointError(f"{directory} could not be loaded; what the engine found is printed above") from end

    @functools.wraps(compare)
    def check_checkpoint_args(saved: Any, *args: Any, **kwargs: Any) -> None:
        compare(saved, *args, **kwargs)
        manager.loaded_arguments(saved)

    replacements.set(training, "load_checkpoint", load_checkpoint)
    replacements.set(checkpointing, "check_checkpoint_args", check_checkpoint_args)
