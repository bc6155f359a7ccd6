"""Our flags beside the engine's: one declaration gives name, default, type and help.

`training/arguments.py` reads them before torch is imported; the engine's parser gets them as its extra arguments, so
that `--help` lists them and a checkpoint remembers them. Metadata: `help`, and `choices` where there are only some.
"""

import argparse
import dataclasses
import typing
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Flags:
    """A field is a flag: `bool` a switch; `str`, `int` or `float`, also with `| None`, a value."""

    model: str | None = field(default=None, metadata={
        "help": "preset that gives the architecture: tiny, mixtral-4x7b, mixtral-8x7b, mixtral-8x22b"})
    hf_checkpoint: str | None = field(default=None, metadata={
        "help": "Hugging Face Mixtral directory to start from, where --load holds no checkpoint yet"})
    metrics_file: str | None = field(default=None, metadata={
        "help": "where the figures of each step go, one JSON object a line (default: SAVE/metrics.jsonl)"})
    moe_aux_loss_convention: str = field(default="megatron", metadata={
        "choices": ("megatron", "hf"),
        "help": "megatron: a balancing loss in each layer; hf: one over all layers, as transformers computes it "
                "(docs/training.md#the-balancing-loss)"})
    log_expert_load: bool = field(default=False, metadata={
        "help": "write each step's tokens of each expert of each layer to expert_load.jsonl beside the metrics file"})
    device_peak_tflops: float | None = field(default=None, metadata={
        "help": "peak of one device in TFLOP/s, for the MFU (default: known for the usual GPUs, dense bf16)"})
    max_nan_steps: int = field(default=5, metadata={
        "help": "end the run when so many steps in a row had a loss or gradient that is not finite; each is skipped"})
    dry_run: bool = field(default=False, metadata={
        "help": "resolve model and layout, say what would run, and start nothing (WORLD_SIZE gives the devices)"})
    save_total_limit: int | None = field(default=None, metadata={
        "help": "keep the last so many checkpoints; an older one is removed once a new one is whole (with "
                "--save-retain-interval its multiples are kept besides)"})
    export_hf_interval: int | None = field(default=None, metadata={
        "help": "write SAVE/hf/iter_NNNNNNN, a Hugging Face folder, every so many steps, in the background, from the "
                "checkpoint saved then: a multiple of --save-interval"})
    verify_checkpoint: bool = field(default=False, metadata={
        "help": "compare every file of the checkpoint with its sum in integrity.json before it is loaded"})
    is_instruction_dataset: bool = field(default=False, metadata={
        "help": "--data-path names instruction data: train the answers only (docs/instruction_data.md)"})
    tokenizer_name_or_path: str | None = field(default=None, metadata={
        "help": "accepted beside the engine's --tokenizer-model; datasets are already tokens, so nothing is loaded"})


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `Flags` to a parser (the engine's extra_args_provider)."""
    group = parser.add_argument_group("megatron_mixtral")
    for item in dataclasses.fields(Flags):
        flag = "--" + item.name.replace("_", "-")
        if item.type is bool:
            group.add_argument(flag, action="store_true", help=item.metadata["help"])
        else:
            kind = next(one for one in typing.get_args(item.type) or (item.type,) if one is not type(None))
            group.add_argument(flag, type=kind, default=item.default, choices=item.metadata.get("choices"),
                               help=item.metadata["help"])
    return parser
