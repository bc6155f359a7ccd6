"""Before the first step: what the run will need, and whether the machine has it. Refuses with a sentence.

Nothing here imports torch or the engine, so the answer comes within a second or two. `training/pretrain.py` calls it.
"""

import logging
from pathlib import Path
from typing import Any

from megatron_mixtral.data.datasets import (
    InstructionFiles,
    blend_of,
    check_instruction,
    check_pretraining,
    identities,
    instruction_blend,
    sizes_of,
)
from megatron_mixtral.data.indexed import tokenizer_of
from megatron_mixtral.disk import free_space, human_size, try_writing
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.planning import RESERVED, RunShape, fullest_stage, stage_memory
from megatron_mixtral.training.arguments import Run

logger = logging.getLogger(__name__)

# The recomputed parts that `RunShape.recompute == "selective"` stands for (docs/performance.md says why these).
SELECTIVE_MODULES = {"moe_act", "layernorm"}


def shape_of(run: Run) -> RunShape | None:
    """The run's `RunShape`, or None without `--micro-batch-size` or `--seq-length`, for which the engine will ask.

    `ConfigError` where the batch does not divide.
    """
    given = run.engine
    if given.seq_length is None or given.micro_batch_size is None:
        return None
    recompute = given.recompute_granularity or "none"
    if recompute == "selective" and not set(given.recompute_modules) >= SELECTIVE_MODULES:
        recompute = "none"  # an upper bound: less is recomputed than the formula assumes
    step = given.micro_batch_size * run.layout.data_parallel
    batch = given.global_batch_size or step
    if given.decrease_batch_size_if_needed and batch > step:
        batch -= batch % step
    return RunShape(
        run.config, run.layout, given.seq_length, given.micro_batch_size, batch, recompute,
        weight_bytes=2 if given.bf16 or given.fp16 else 4, distributed_optimizer=given.use_distributed_optimizer,
        adapter=run.adapter)


def check_data(run: Run) -> None:
    """`DataError` for data sets that are missing, damaged, too short for one sample, or of another vocabulary."""
    given, vocabulary, length = run.engine, run.config.vocab_size, run.engine.seq_length or 1
    data = [given.data_path, given.train_data_path, given.valid_data_path, given.test_data_path]
    if not run.flags.is_instruction_dataset:
        check_pretraining([blend_of(words) for words in data], vocabulary, length)
        return
    if not any(data):
        raise ConfigError("--is-instruction-dataset needs --data-path PREFIX, as tools/preprocess_data.py wrote it")
    rows = max(given.micro_batch_size or 1, given.eval_micro_batch_size or 1)
    check_instruction([instruction_blend(words) for words in data], vocabulary, length, rows, run.layout.chunks)


def steps_of_epochs(run: Run, shape: RunShape) -> tuple[int, str]:
    """The steps of `--train-epochs`, and a sentence on them: as many as read every row of the training split so many
    times. The last batch is filled up from the next epoch. `DataError` for files that are missing, `ConfigError` for
    sets with weights, which end their epochs at different steps.
    """
    given, epochs = run.engine, run.flags.train_epochs
    words = given.data_path or given.train_data_path
    blend = instruction_blend(words)
    if blend is None:
        raise ConfigError(f"--train-epochs {epochs}: no data are given whose rows could be counted; give --data-path")
    prefixes, weights = blend
    if weights is not None and len(prefixes) > 1:
        raise ConfigError(f"--train-epochs {epochs} with weights ({' '.join(words)}): each set ends its epoch at "
                          "another step; give the sets without weights, each row of which is read once an epoch, or "
                          "--train-iters")
    rows = sum(rows_trained_on(prefix, given.named.get("--split") if given.data_path else "1,0,0")
               for prefix in prefixes)
    if not rows:
        raise ConfigError(f"--train-epochs {epochs}: the training split of {', '.join(prefixes)} has no row; give "
                          "--split 100,0,0")
    steps = -(-rows * epochs // shape.global_batch_size)
    said = f"{epochs} epoch(s) of {rows:,} rows / --global-batch-size {shape.global_batch_size} = {steps:,} step(s)"
    share = given.named.get("--lr-warmup-fraction")
    return steps, said + (f", the first {share * steps:.3g} of them warm-up" if share else "")


def rows_trained_on(prefix: str, split: str | None) -> int:
    """Rows of an instruction set in the training part of `--split`, as the engine rounds it."""
    return round(training_share(split) * len(InstructionFiles(prefix)))


def training_share(split: str | None) -> float:
    """The training set's part of `--split 98,1,1`; the engine's default is 969, 30, 1."""
    sizes = sizes_of(split)
    return sizes[0] / sum(sizes)


def identify_data(run: Run) -> dict[str, str]:
    """What each data set of the run is, to be kept in its checkpoints. Rank 0 asks, once."""
    given, blend = run.engine, instruction_blend if run.flags.is_instruction_dataset else blend_of
    words = [given.data_path, given.train_data_path, given.valid_data_path, given.test_data_path]
    return identities(map(blend, words), run.flags.is_instruction_dataset)


def tokenizers_of(run: Run) -> list[str | None]:
    """Where the tokenizer of the run's model may be: with the weights that it starts from, where the flags say, where
    the report beside its first data set says.
    """
    given = run.engine
    places = [run.flags.hf_checkpoint, given.load, given.pretrained_checkpoint, given.named.get("--tokenizer-model"),
              run.flags.tokenizer_name_or_path]
    blend = None if run.flags.is_instruction_dataset else blend_of(given.data_path or given.train_data_path)
    noted = tokenizer_of(blend[0][0]) if blend else None
    return [*places, noted and noted.get("path")]


def check_backend(run: Run, backend: Any) -> None:
    """`ConfigError` where this machine's `runtime.Backend` lacks what the run needs of it."""
    if not run.engine.named.get("--disable-jit-fuser"):
        backend.check_compiler()
    if run.engine.save or run.engine.load:
        backend.check_checkpoints()


def check_memory(shape: RunShape, device_memory: int) -> None:
    """`ConfigError` where weights, gradients, optimizer and the cache of evaluations alone do not fit `device_memory`
    bytes; a warning where the whole estimate does not.
    """
    stage = fullest_stage(shape)
    memory = stage_memory(shape, stage)
    fixed = memory.weights + memory.gradients + memory.optimizer + memory.evaluation_cache
    advice = ("raise --expert-model-parallel-size, --pipeline-model-parallel-size or --tensor-model-parallel-size, or "
              "add --use-distributed-optimizer; tools/plan_layout.py ranks what fits")
    cache = ""
    if memory.evaluation_cache:
        cache = f" + {human_size(memory.evaluation_cache)} for the cache of --eval-tasks or --evaluation-prompts"
        advice = "leave these out and measure its checkpoints with tools/evaluate_mixtral.py, or " + advice
    if fixed > device_memory:
        raise ConfigError(
            f"the run does not fit: a device of stage {stage} needs {human_size(memory.weights)} for weights + "
            f"{human_size(memory.gradients)} for gradients + {human_size(memory.optimizer)} for the optimizer{cache} = "
            f"{human_size(fixed)}, and has {human_size(device_memory)}: {advice}")
    whole = memory.total + (RESERVED if device_memory > 4 * RESERVED else 0)
    if whole > device_memory:
        logger.warning(
            "the run is likely to run out of memory: with %s of activations and %s of logits%s a device of stage %d "
            "needs about %s and has %s; try --recompute-granularity, a smaller --micro-batch-size, or another layout",
            human_size(memory.activations), human_size(memory.logits), cache.replace(" + ", " and ", 1), stage,
            human_size(whole), human_size(device_memory))


def check_places(run: Run, rank: int | None = None) -> None:
    """`ConfigError` where a directory that `rank` writes into (any rank, where it is None) cannot be made, or takes no
    file.
    """
    given, last = run.engine, run.layout.world - 1
    data = () if run.flags.is_instruction_dataset else (given.data_path, given.train_data_path)
    prefix = next((prefixes[0] for prefixes, _ in filter(None, map(blend_of, data))), None)
    cache = Path(given.data_cache_path or f"{prefix}_index_cache") if prefix else None
    if cache is not None and cache.is_dir() and any(cache.iterdir()):
        cache = None  # it may have been built ahead of the run, which then only reads it
    metrics = run.flags.metrics_file
    places = {"--save": (given.save, rank), "--metrics-file": (metrics and Path(metrics).absolute().parent, last),
              "--tensorboard-dir": (given.tensorboard_dir, last), "--wandb-save-dir": (given.wandb_save_dir, last),
              "--data-cache-path": (cache, 0)}
    for flag, (place, writer) in places.items():
        if place and rank in (None, writer):
            try:
                Path(place).mkdir(parents=True, exist_ok=True)
                try_writing(place)
            except OSError as error:
                raise ConfigError(f"{flag}: the run cannot write in {place} ({error.strerror}): give a directory that "
                                  "it can, or make this one writable") from error


def check_disk(run: Run, shape: RunShape) -> None:
    """`ConfigError` where the file system of `--save` has no room for one checkpoint.

    A checkpoint holds what is trained once and, without `--no-save-optim`, fp32 weights and both moments. Nodes are
    assumed to share the file system.
    """
    save = run.engine.save
    if save is None:
        return
    per_parameter = shape.weight_bytes + (0 if run.engine.no_save_optim else 12)
    parameters = shape.config.total_parameters if run.adapter is None else run.adapter.trained_parameters
    need, free = parameters * per_parameter, free_space(save)
    if need > free:
        raise ConfigError(
            f"--save {save}: one checkpoint needs {human_size(need)} ({parameters / 1e9:.2f} G parameters x "
            f"{per_parameter} bytes) and its file system has {human_size(free)} free: make room, save elsewhere, or "
            "leave the optimizer out with --no-save-optim")
