"""The `args` namespace inside the checkpoints that are written here: the engine's table, and its bookkeeping.

The engine stores its command line in every checkpoint, compares a few of its values when loading, and can take the
architecture from it (`--use-checkpoint-args`); see `check_checkpoint_args` and `load_args_from_checkpoint` in
`megatron.training.checkpointing`. What the arguments mean, and how they are read, is in `config/engine.py`.
"""

import argparse
from typing import Any

from megatron_mixtral.config import AdapterConfig, MixtralConfig, ParallelLayout, engine
from megatron_mixtral.weights.files import pickle_writer


def release_state(config: MixtralConfig, layout: ParallelLayout, padded_vocab: int, divisible_by: int,
                  dtypes: dict[str, str], ckpt_format: str = "torch") -> dict[str, Any]:
    """What a converted checkpoint has beside the model, under the engine's names, to be pickled.

    The arguments say architecture and layout; `params_dtype` is the type of most tensors, of which `dtypes` has all.
    Rank files name their experts one by one, which the engine reads into its sequential experts only; in a silent
    half-load elsewhere. So they say that these are meant. Distributed checkpoints fit all, and leave it to the run.
    """
    kinds = list(dtypes.values())
    dtype = max(sorted(set(kinds)), key=kinds.count)
    said = engine.saved_args(config)
    # In this order stand the arguments of every checkpoint that was converted so far: equal models, equal files.
    vocabulary, window = said.pop("vocab_size"), said.pop("window_size")
    experts = {"moe_grouped_gemm": False} if ckpt_format == "torch" else {}
    args = argparse.Namespace(
        **said, **experts, vocab_size=vocabulary, padded_vocab_size=padded_vocab,
        make_vocab_size_divisible_by=divisible_by, window_size=window, **engine.layout_args(layout),
        ckpt_format=ckpt_format, params_dtype=pickle_writer.Global("torch", dtype), bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        **(config.to_args() if isinstance(config, AdapterConfig) else {}),
        iteration=0, consumed_train_samples=0, skipped_train_samples=0, consumed_valid_samples=0)
    return {"args": args, "checkpoint_version": 3.0, "iteration": 0, "num_floating_point_operations_so_far": 0}
