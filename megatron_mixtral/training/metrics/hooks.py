"""What a run tells of itself each step: installed once by `training/pretrain.py`, called by the engine.

Two seams. The engine hands its scalars to its TensorBoard writer, in whose place `StepWriter` stands on the
last rank; and every rank calls its tracker of MoE metrics once a step, where the ranks' own metrics are put together.
"""

import functools
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker
from megatron.training import get_tensorboard_writer, get_timers, get_wandb_writer, global_vars

from megatron_mixtral import runtime
from megatron_mixtral.training.arguments import Run
from megatron_mixtral.training.metrics.evaluation import Evaluation
from megatron_mixtral.training.metrics.expert_load import ExpertLoad
from megatron_mixtral.training.metrics.waiting import Waiting
from megatron_mixtral.training.metrics.writer import RunFacts, StepClock, StepWriter
from megatron_mixtral.training.ranks import RankSeconds


class Tracker(MoEMetricsTracker):
    """The engine's tracker, which also gives the writer the load of the experts, the memory of the fullest rank,
    how long the rank waited for data that waited longest, and what each rank did with its time; and has the model
    asked when it is time.
    """

    def __init__(self, load: ExpertLoad, waiting: Waiting, seconds: RankSeconds, device: str,
                 after_step: Callable[[torch.Tensor], None], evaluate: Callable[[int], dict[str, float]]) -> None:
        super().__init__()
        self._load, self._waiting, self._seconds, self._device = load, waiting, seconds, device
        self._after_step, self._evaluate = after_step, evaluate

    def report(self, *args: Any, writer: Any = None, **kwargs: Any) -> str:
        """Every rank calls it once a step. `writer` is the `StepWriter` on the last rank, None elsewhere."""
        text = super().report(*args, writer=writer, **kwargs)
        tokens = self._load.collect()
        self._after_step(tokens)
        most = torch.tensor([runtime.memory_used(), round(self._waiting.take() * 1e9)], dtype=torch.int64,
                            device=self._device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        of_ranks = self._seconds.collect(kwargs["iteration"])
        if writer is not None:
            memory, nanoseconds = most.tolist()
            writer.observe(expert_tokens=tokens.tolist(), memory_bytes=memory, data_seconds=nanoseconds / 1e9,
                           of_ranks=of_ranks)
        figures = self._evaluate(kwargs["iteration"])
        if writer is not None:
            writer.evaluated(figures)
        return text


def install(run: Run, args: Namespace, device: str, waiting: Waiting, seconds: RankSeconds,
            after_step: Callable[[torch.Tensor], None], evaluation: Evaluation | None = None) -> ExpertLoad:
    """Stand in the engine's places; returns the counter that is to watch every part of the model. `after_step` is
    called after each step, on every rank, with the tokens [layers, experts] of all ranks.
    """
    load = ExpertLoad(run.config.num_hidden_layers, run.config.num_local_experts, device)
    set_moe_metrics_tracker(Tracker(load, waiting, seconds, device, after_step,
                                    functools.partial(_evaluate, evaluation, args)))
    metrics = _metrics_file(run, args)
    if evaluation is not None and metrics is not None:
        evaluation.folder = metrics.parent
    if args.rank == args.world_size - 1:
        clock = StepClock(get_timers()("interval-time", log_level=0), args.log_interval)
        global_vars._GLOBAL_TENSORBOARD_WRITER = StepWriter(
            _facts(run, args), lap=clock.lap, global_batch_size=get_current_running_global_batch_size,
            train_iters=lambda: args.train_iters, consumed_samples=lambda: args.consumed_train_samples, path=metrics,
            load_path=metrics.with_name("expert_load.jsonl") if run.flags.log_expert_load and metrics else None,
            tensorboard=get_tensorboard_writer(), tensorboard_interval=args.tensorboard_log_interval,
            wandb=get_wandb_writer(), max_nan_steps=run.flags.max_nan_steps)
    # The engine hands over its scalars at this interval; the writer keeps to the user's where TensorBoard is concerned.
    args.tensorboard_log_interval = 1
    return load


def _evaluate(evaluation: Evaluation | None, args: Namespace, iteration: int) -> dict[str, float]:
    """As the engine does it for validation: the step's time stands still."""
    if evaluation is None or not evaluation.due(iteration, args.train_iters):
        return {}
    timer = get_timers()("interval-time", log_level=0)
    timer.stop()
    figures = evaluation.after(iteration)
    timer.start(barrier=True)
    return figures


def _metrics_file(run: Run, args: Namespace) -> Path | None:
    """Where the metrics of each step go, if anywhere."""
    if run.flags.metrics_file:
        return Path(run.flags.metrics_file)
    return Path(args.save) / "metrics.jsonl" if args.save else None


def _facts(run: Run, args: Namespace) -> RunFacts:
    peak = run.flags.device_peak_tflops
    if peak is None and (args.bf16 or args.fp16):
        peak = runtime.peak_tflops()
    smallest = args.loss_scale or (args.min_loss_scale if args.fp16 else None)
    return RunFacts(flops_per_token=run.config.training_flops_per_token(args.seq_length), seq_length=args.seq_length,
                    devices=args.world_size, peak_tflops=peak, smallest_loss_scale=smallest)
