"""The pretraining program: providers, forward step, one call of the engine. `tools/pretrain_mixtral.py` runs it."""

import logging
import os
import signal
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import ConfigError, RankLostError
from megatron_mixtral.planning.report import describe
from megatron_mixtral.training import arguments, preflight
from megatron_mixtral.training.arguments import Run
from megatron_mixtral.training.flags import add_flags

logger = logging.getLogger(__name__)


def run(argv: list[str]) -> None:
    """Train as the command line says. `MixtralError` before the first step for whatever can be known before it."""
    resolved = arguments.resolve(argv, os.environ)  # before torch is imported, so that it refuses within a second
    shape = preflight.shape_of(resolved, argv)
    if resolved.flags.dry_run:
        logger.info("%s", resolved)
        for line in describe(shape) if shape is not None else ["needs: give --seq-length and --micro-batch-size"]:
            logger.info("%s", line)
        return
    from megatron_mixtral import runtime

    preflight.check_data(resolved, argv)
    if shape is not None:
        preflight.check_disk(shape, argv)
        preflight.check_memory(shape, runtime.device_memory())
    backend = runtime.ready(training=True)
    args = _engine_args(resolved, argv, backend)
    if args.rank == 0:
        logger.info("%s; %s, %s collectives (%s)", resolved, backend.device, backend.collectives, backend.reason)

    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_mixtral.training.checkpoints import start as checkpoint
    from megatron_mixtral.training.checkpoints.manager import Keeper
    from megatron_mixtral.training.metrics import hooks as observer

    if args.save and args.rank == 0:
        checkpoint.write_identity(Path(args.save), resolved.config)
    keeper = Keeper(args)
    runtime.lead_checkpoints_through(keeper)
    load = observer.install(resolved, args, backend.device, after_first_step=_end_at_signals(args))
    datasets, forward_step = partial(_datasets, args), _forward_step
    if args.is_instruction_dataset:
        from megatron_mixtral.training import finetune

        datasets, forward_step = partial(finetune.datasets, args), finetune.forward_step
    datasets.is_distributed = True  # every rank that needs data reads its own; see _datasets
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*It is recommended to use a ModelConfig")
        container = pretrain_cfg_container_from_args(args)
    try:
        pretrain(container, datasets, ModelType.encoder_or_decoder, forward_step,
                 model_provider=partial(_model, resolved, args, load), store=runtime.store_of_this_start())
    except SystemExit as end:  # the engine's way out at a signal, --exit-interval and --exit-duration-in-mins
        if not end.code:
            keeper.close()
        raise
    except RuntimeError as error:
        if runtime.lost_a_rank(error):
            raise RankLostError(f"rank {args.rank} stops, because another rank has ended: torchrun's report names the "
                                "first one. The same command goes on from the last checkpoint") from error
        raise
    keeper.close()


def build_index_cache(argv: list[str]) -> None:
    """Build the index cache that a run with this command line looks for, in one process and without a model.

    WORLD_SIZE gives the number of devices of that run, where the batch depends on it. `MixtralError` as for `run`.
    """
    resolved = arguments.resolve(argv, os.environ)
    preflight.check_data(resolved, argv)
    from megatron_mixtral import runtime

    args = _engine_args(resolved, argv, runtime.ready(training=True))
    if args.is_instruction_dataset:
        raise ConfigError("--is-instruction-dataset needs no index cache: packed samples are read in their order")
    if not any((args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path)):
        raise ConfigError("without --data-path (or --train-data-path ...) there is nothing to build a cache for")
    from megatron.training import get_train_valid_test_num_samples
    from megatron.training.training import update_train_iters

    update_train_iters(args)
    built = _datasets(args, get_train_valid_test_num_samples())
    for name, dataset in zip(("training", "validation", "test"), built, strict=True):
        if dataset is not None:
            logger.info("%s: %d samples, index in %s", name, len(dataset), dataset.config.path_to_cache)


def _engine_args(resolved: Run, argv: list[str], backend: Any) -> Namespace:
    """The engine's arguments, parsed, validated and made the engine's global ones."""
    from megatron.training.arguments import parse_and_validate_args

    defaults = arguments.engine_defaults(resolved, backend.transformer_impl, backend.collectives)

    def extra(parser: Any) -> Any:
        add_flags(parser)
        # The engine has the switch on only.
        parser.add_argument("--no-moe-grouped-gemm", action="store_false", dest="moe_grouped_gemm",
                            help="one matrix product per expert, as the engine's local experts compute")
        parser.set_defaults(**defaults)
        return parser

    saved, sys.argv = sys.argv, [sys.argv[0], *arguments.strip_tokenizer(argv)]
    try:
        args = parse_and_validate_args(extra)
    except (AssertionError, ValueError) as error:
        words = str(error) or traceback.extract_tb(error.__traceback__)[-1].line  # a bare assertion is its own sentence
        raise ConfigError(f"megatron-core refuses these flags: {words}") from error
    finally:
        sys.argv = saved
    # --use-checkpoint-args takes it from the checkpoint, as if it were architecture. Our experts read either form.
    args.moe_grouped_gemm = "--no-moe-grouped-gemm" not in argv
    arguments.check_contradictions(args, resolved.config)
    if backend.device == "cpu":
        # A process forked for each save has the weights as they were at that moment. The persistent one would get them
        # as shared memory, in which training goes on.
        args.use_persistent_ckpt_worker = False
    args.grad_norm_skip_threshold = sys.float_info.max  # no flag of the engine's: skips what is not finite
    return args


def _end_at_signals(args: Namespace) -> Callable[[], None]:
    """Until the function returned is called, SIGTERM and SIGINT end the process at once: there is nothing to save, and
    a rank that waits for another one inside a library would not hear them. From then on they do what the engine does
    at `--exit-signal`: save after the step under way, and end.
    """
    numbers, save_and_end = (args.exit_signal, signal.SIGTERM, signal.SIGINT), signal.getsignal(args.exit_signal)
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)

    def save_first() -> None:
        for number in numbers:
            signal.signal(number, save_and_end)

    return save_first


# -- providers -------------------------------------------------------------------------------------------


def _model(resolved: Run, args: Namespace, load: Any, pre_process: bool = True, post_process: bool = True,
           vp_stage: int | None = None, config: Any = None, pg_collection: Any = None) -> Any:
    """The engine's model provider: one pipeline stage or model chunk, with Hugging Face's weights if asked for."""
    from megatron.training.argument_utils import core_transformer_config_from_args

    from megatron_mixtral.model import build
    from megatron_mixtral.training.checkpoints import start as checkpoint

    model = build(resolved.config, config or core_transformer_config_from_args(args),
                  max_sequence_length=args.max_position_embeddings, padded_vocab_size=args.padded_vocab_size,
                  pg_collection=pg_collection, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage,
                  pool_aux_loss=resolved.flags.moe_aux_loss_convention == "hf")
    if resolved.load_hf:
        checkpoint.load_hf(model, resolved.flags.hf_checkpoint, resolved.layout.coord_of(args.rank), resolved.layout,
                           chunk=vp_stage or 0, padded_vocab=args.padded_vocab_size)
    load.watch(model)
    return model


def _datasets(args: Namespace, samples: Any, vp_stage: int | None = None) -> Any:
    """The engine's datasets provider. Each rank that reads does so for itself: the files are memory-mapped, so this
    costs less than a broadcast of every batch.
    """
    from megatron.training import get_tokenizer

    from megatron_mixtral.data.datasets import blend_of, build_pretraining

    per_split = [args.train_data_path, args.valid_data_path, args.test_data_path]
    blends = [blend_of(words) for words in per_split] if any(per_split) else None
    return build_pretraining(
        samples, tokenizer=get_tokenizer(), seq_length=args.seq_length, seed=args.seed, blend=blend_of(args.data_path),
        blend_per_split=blends, split=args.split if blends is None else None, cache=args.data_cache_path,
        is_built_on_rank=lambda: _reads(args, vp_stage),
        reset_position_ids=args.reset_position_ids, reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss, mmap_bin_files=args.mmap_bin_files,
        num_dataset_builder_threads=args.num_dataset_builder_threads)


def _reads(args: Namespace, vp_stage: int | None) -> bool:
    """Whether this stage needs batches: the first and the last, and all whose routers must know the trained tokens."""
    from megatron.training.utils import is_first_or_last_pipeline_stage

    return is_first_or_last_pipeline_stage(vp_stage) or (args.calculate_per_token_loss and args.eod_mask_loss)


# -- one micro-batch -------------------------------------------------------------------------------------

_BATCH = ("tokens", "labels", "loss_mask", "position_ids")


def _batch(data_iterator: Iterator[dict[str, Any]] | None, reads: bool) -> dict[str, Any]:
    """The next micro-batch on this rank's device: each [micro_batch, sequence], or None in the middle stages."""
    import torch
    from megatron.core import mpu
    from megatron.core.utils import get_batch_on_this_cp_rank

    if data_iterator is None or not reads:
        return dict.fromkeys(_BATCH)
    sample = next(data_iterator)
    batch = {name: sample[name].to(torch.cuda.current_device(), non_blocking=True) for name in _BATCH}
    if mpu.get_context_parallel_world_size() > 1:
        batch = get_batch_on_this_cp_rank({**batch, "cu_seqlens": None}, is_hybrid_cp=False,
                                          cp_group=mpu.get_context_parallel_group())
    return batch


def _forward_step(data_iterator: Iterator[dict[str, Any]] | None, model: Any) -> tuple[Any, Any]:
    """The engine's forward step: (token losses or hidden states, the function that makes the loss of them)."""
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_args, get_timers

    from megatron_mixtral.training.loss import masked_sum

    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = _batch(data_iterator, _reads(get_args(), get_attr_wrapped_model(model, "vp_stage")))
    timers("batch-generator").stop()
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"],
                   loss_mask=batch["loss_mask"])
    return output, partial(masked_sum, loss_mask_bs=batch["loss_mask"])
