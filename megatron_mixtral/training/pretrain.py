"""The training program: checks, arguments, one call of the engine. Two commands."""

import dataclasses
import functools
import logging
import os
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_mixtral.config import Coord, engine
from megatron_mixtral.errors import ConfigError, DataError, MixtralError, RankLostError
from megatron_mixtral.planning import RunShape, describe
from megatron_mixtral.runtime import launch
from megatron_mixtral.training import adapters, arguments, data_files, engine_flags, preflight, screen
from megatron_mixtral.training.arguments import Run
from megatron_mixtral.training.checkpoints import Lease, lease
from megatron_mixtral.training.flags import add_flags, help_of, without
from megatron_mixtral.training.metrics import evaluation
from megatron_mixtral.training.signals import end_at_signals

logger = logging.getLogger(__name__)


def run(argv: Sequence[str]) -> int:
    """Train as the command line says, or start the ranks that do. `MixtralError` before the first step for whatever can
    be known before it. Returns 0, or 1 on a rank that leaves it to another one of its node to say what is wrong.
    """
    if (page := help_of(argv, "pretrain")) is not None:
        sys.stdout.write(page)
        return 0
    return launch.as_rank(partial(_run, list(argv)))


def check(argv: Sequence[str]) -> Run:
    """The run of a command line. `MixtralError` for one that cannot be, as far as it is known without its data."""
    resolved = arguments.resolve(list(argv), os.environ)
    evaluation.check(resolved)
    return resolved


def _run(argv: list[str]) -> None:
    typed, argv = argv, data_files.expand(argv)
    resolved = arguments.resolve(argv, os.environ)  # before torch is imported, so that it refuses within a second
    evaluation.check(resolved)
    shape = preflight.shape_of(resolved)
    if resolved.flags.dry_run:
        logger.info("%s", resolved)
        shape = _with_cache_or_why_not(resolved, shape)
        for line in describe(shape) if shape is not None else ["needs: give --seq-length and --micro-batch-size"]:
            logger.info("%s", line)
        if resolved.flags.train_epochs is not None:
            logger.info("steps: %s", _epochs_or_why_not(resolved, shape))
        return
    data_files.require(argv)
    launch.set_variables(resolved.ranks.to_train())
    rank = None if resolved.ranks.starts else int(os.environ["RANK"])
    preflight.check_data(resolved)
    if resolved.flags.train_epochs is not None:
        steps, said = preflight.steps_of_epochs(resolved, shape)
        argv = [*argv, "--train-iters", str(steps)]
        if rank == 0:
            logger.info("steps   %s", said)
    preflight.check_places(resolved, rank)
    asked = evaluation.read(resolved)
    if rank is None:
        evaluation.check_names(asked)
    if shape is not None:
        shape = _with_cache(resolved, shape, asked)
        preflight.check_disk(resolved, shape)
    save = Path(resolved.engine.save) if resolved.engine.save else None
    if save is not None and rank != 0:
        lease.refuse_if_held(save, lease.this_process(os.environ))
    launch.take_part(resolved.ranks, "pretrain", typed)
    held = lease.acquire(save, lease.this_process(os.environ)) if save is not None and rank == 0 else None
    try:
        with screen.Output(save, rank, resolved.flags.log_level) as output:
            _train(resolved, argv, shape, held, asked, output)
    finally:
        if held is not None:
            held.release()


def _with_cache(run: Run, shape: RunShape, asked: evaluation.Plan | None) -> RunShape:
    """The run's shape, with what it takes to ask its model as it learns."""
    return shape if asked is None else dataclasses.replace(shape, cache=asked.cache(run.config))


def _with_cache_or_why_not(run: Run, shape: RunShape | None) -> RunShape | None:
    """The same for a dry run; tokenizer, prompts and questions need not be there yet."""
    try:
        return None if shape is None else _with_cache(run, shape, evaluation.read(run))
    except MixtralError as error:
        logger.info("evaluation: its cache is counted once this is mended: %s", error)
        return shape


def _epochs_or_why_not(run: Run, shape: RunShape) -> str:
    """What a dry run says of `--train-epochs`; the data need not be there yet."""
    try:
        return preflight.steps_of_epochs(run, shape)[1]
    except DataError as error:
        return f"{run.flags.train_epochs} epoch(s), counted once the data are there: {error}"


def _train(resolved: Run, argv: list[str], shape: RunShape | None, held: Lease | None,
           asked: evaluation.Plan | None, output: screen.Output) -> None:
    """Be a rank. `held` is the lease of --save, on rank 0; `asked` is what the model is asked as it learns; `output` is
    to be named once the ranks are connected.
    """
    from megatron_mixtral import runtime

    memory = runtime.device_memory()
    if shape is not None:
        preflight.check_memory(shape, memory)
    backend = runtime.ready(training=True)
    engine_flags.check_device(resolved.engine.named, backend.device)
    preflight.check_backend(resolved, backend)
    args = _engine_args(resolved, argv, backend)

    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_mixtral.training import micro_batch
    from megatron_mixtral.training.checkpoints import CheckpointManager
    from megatron_mixtral.training.metrics import Waiting, install
    from megatron_mixtral.training.ranks import RankSeconds, SignsOfLife

    asks = evaluation.begin(asked, resolved)
    if args.rank == 0:
        args.data_identity = preflight.identify_data(resolved)  # goes into every checkpoint
        where = f"{backend.device}, {backend.collectives} collectives"
        for line in screen.summary(resolved, shape, where, memory, args.data_identity, args.train_iters):
            logger.info("%s", line)
        if args.save:
            _name_what_is_saved(Path(args.save), resolved)
    manager = CheckpointManager(args, held)
    runtime.lead_checkpoints_through(manager)
    seconds = RankSeconds(resolved.flags.rank_seconds_interval, backend.waits(), backend.device)
    life = SignsOfLife(args.rank, args.world_size, resolved.flags.rank_timeout_seconds, os.environ)
    waiting = Waiting(seconds.begin)
    tuned = None if resolved.adapter is None else adapters.AdapterRun(resolved.flags, resolved.adapter, args)
    saves_at_signals = functools.cache(end_at_signals(args.exit_signal))

    def after_step(tokens: Any) -> None:
        saves_at_signals()
        life.after_step(_own_store)
        if tuned is not None:
            tuned.look(tokens)

    load = install(resolved, args, backend.device, waiting, seconds, after_step, asks)
    forward_step = micro_batch.instruction_step if args.is_instruction_dataset else micro_batch.text_step
    datasets = partial(_datasets, args, asks)
    datasets.is_distributed = True  # every rank that needs data reads its own
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*It is recommended to use a ModelConfig")
        container = pretrain_cfg_container_from_args(args)
    try:
        watchers, connected = (load, asks), functools.cache(output.settle)
        with life:
            pretrain(container, datasets, ModelType.encoder_or_decoder, waiting.timed(forward_step),
                     model_provider=partial(_model, resolved, args, watchers, tuned, connected),
                     store=runtime.store_of_this_start())
    except SystemExit as end:  # the engine's way out at a signal, --exit-interval and --exit-duration-in-mins
        if not end.code:
            manager.close()
        raise
    except RuntimeError as error:
        if runtime.lost_a_rank(error):
            raise RankLostError("stopped, because another rank has ended: look for the first that says why, or that "
                                "torchrun names. The same command goes on from the last checkpoint") from error
        raise
    manager.close()


def _name_what_is_saved(save: Path, resolved: Run) -> None:
    """Write what readers of the checkpoints need beside them: the architecture and the tokenizer."""
    from megatron_mixtral.training.checkpoints import directory

    directory.write_identity(save, resolved.config)
    directory.carry_tokenizer(save, preflight.tokenizers_of(resolved))


def build_index_cache(argv: Sequence[str]) -> int:
    """Build the index cache that a run with this command line looks for, in one process and without a model. Returns 0.

    WORLD_SIZE gives the number of devices of that run, where the batch depends on it. `MixtralError` as for `run`.
    """
    if (page := help_of(argv, "build-index-cache")) is not None:
        sys.stdout.write(page)
        return 0
    argv = data_files.expand(argv)
    resolved = arguments.resolve(argv, os.environ)
    data_files.require(argv)
    preflight.check_data(resolved)
    from megatron_mixtral import runtime

    launch.set_variables({"WORLD_SIZE": str(resolved.ranks.world)})
    args = _engine_args(resolved, argv, runtime.ready(training=True))
    if args.is_instruction_dataset:
        raise ConfigError("--is-instruction-dataset needs no index cache: packed samples are read in their order")
    if args.mock_data:
        raise ConfigError("--mock-data are made as they are read: there is nothing to build a cache for")
    from megatron.training import get_train_valid_test_num_samples
    from megatron.training.training import update_train_iters

    from megatron_mixtral.training import micro_batch

    update_train_iters(args)
    built = micro_batch.datasets(args, get_train_valid_test_num_samples())
    for name, dataset in zip(("training", "validation", "test"), built, strict=True):
        if dataset is not None:
            logger.info("%s: %d samples, index in %s", name, len(dataset), dataset.config.path_to_cache)
    return 0


def _engine_args(resolved: Run, argv: Sequence[str], backend: Any) -> Namespace:
    """The engine's arguments, parsed, validated and made the engine's global ones."""
    from megatron.training.arguments import parse_and_validate_args

    grouped = not resolved.flags.no_moe_grouped_gemm  # the engine has the switch on only
    defaults = arguments.engine_defaults(resolved, backend.transformer_impl, backend.collectives)

    def extra(parser: Any) -> Any:
        add_flags(parser).set_defaults(**{**defaults, "moe_grouped_gemm": grouped})
        return parser

    # Training loads no tokenizer, and the engine does not know the names of our tools.
    saved, sys.argv = sys.argv, [sys.argv[0], *without(argv, "--tokenizer-type")]
    try:
        args = parse_and_validate_args(extra)
    except (AssertionError, ValueError) as error:
        words = str(error) or traceback.extract_tb(error.__traceback__)[-1].line  # a bare assertion is its own sentence
        raise ConfigError(f"megatron-core refuses these flags: {words}") from error
    finally:
        sys.argv = saved
    # --use-checkpoint-args takes it from the checkpoint, as if it were architecture. Our experts read either form.
    args.moe_grouped_gemm = grouped
    engine.check_flags(args, resolved.config)
    if backend.device == "cpu":
        # A process forked for each save has the weights as they were at that moment. The persistent one would get them
        # as shared memory, in which training goes on.
        args.use_persistent_ckpt_worker = False
    args.grad_norm_skip_threshold = sys.float_info.max  # no flag of the engine's: skips what is not finite
    return args


def _datasets(args: Namespace, asks: Any, *arguments: Any, vp_stage: int | None = None) -> Any:
    """The engine's datasets provider. It is called on every rank when the model is loaded, before the first step; with
    virtual stages the engine looks for a parameter `vp_stage`.
    """
    from megatron_mixtral.training import micro_batch

    if asks is not None:
        asks.after(args.iteration)
    return micro_batch.datasets(args, *arguments, vp_stage=vp_stage)


def _own_store() -> Any:
    """A connection of its own to the store of the process group, for a thread."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store().clone()


def _from_first_rank(word: str) -> str:
    """Rank 0's `word`, on every rank; all have to call it."""
    import torch.distributed as dist

    words = [word]
    dist.broadcast_object_list(words)
    return words[0]


def _model(resolved: Run, args: Namespace, watchers: Any, tuned: Any, connected: Callable[[Any], Any],
           pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, config: Any = None,
           pg_collection: Any = None) -> Any:
    """The engine's model provider: one pipeline stage or model chunk, with Hugging Face's weights if asked for. It is
    the first place that every rank comes to when all are connected, which it says to `connected`.
    """
    from megatron.core import mpu
    from megatron.training.argument_utils import core_transformer_config_from_args

    from megatron_mixtral.model import build, fill
    from megatron_mixtral.weights import open_source

    connected(_from_first_rank)
    make = partial(build, resolved.config) if tuned is None else tuned.build
    model = make(config or core_transformer_config_from_args(args),
                 max_sequence_length=args.max_position_embeddings, padded_vocab_size=args.padded_vocab_size,
                 pg_collection=pg_collection, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage,
                 pool_aux_loss=resolved.flags.moe_aux_loss_convention == "hf")
    # The engine is asked where this rank is: --use-tp-pp-dp-mapping counts the ranks in another order.
    coord = Coord(mpu.get_pipeline_model_parallel_rank(), mpu.get_tensor_model_parallel_rank(),
                  mpu.get_expert_model_parallel_rank(), mpu.get_expert_tensor_parallel_rank())
    into = partial(fill, model, coord=coord, layout=resolved.layout, chunk=vp_stage or 0,
                   padded_vocab=args.padded_vocab_size)
    if resolved.load_hf:
        into(open_source(resolved.flags.hf_checkpoint), places=None if tuned is None else tuned.base_places(model))
    if tuned is not None:
        tuned.fill(model, into)
    for watcher in filter(None, watchers):
        watcher.watch(model)
    return model
