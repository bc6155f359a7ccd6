"""The command line of a training run: our flags, those of the engine that are needed early, and one parse of all.

`parse()` needs the standard library only. It knows every flag of the pinned engine and what becomes of it here
(`engine_flags/`), so that a flag that nobody knows or that cannot work is refused before torch is imported, also in a
dry run. The engine's own parser then gets the same words, with `Flags` as its extra arguments, so that a checkpoint
remembers them.
"""

import argparse
import dataclasses
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from megatron_mixtral.command_line import Parser
from megatron_mixtral.config import AdapterConfig
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.training import engine_flags


@dataclass(frozen=True)
class Flags:
    """Ours. A field is a flag: `bool` a switch; `str`, `int` or `float`, also with `| None`, a value. Metadata: `help`,
    the `task` under which `--help` has it, `choices` where there are only some, else what the `value` is (N).
    """

    model: str | None = field(default=None, metadata={
        "task": "model and start", "value": "NAME",
        "help": "preset that gives the architecture: tiny, mixtral-4x7b, mixtral-8x7b, mixtral-8x22b"})
    hf_checkpoint: str | None = field(default=None, metadata={
        "task": "model and start", "value": "DIR",
        "help": "Hugging Face Mixtral directory to start from, where --load holds no checkpoint yet"})
    nproc: int | None = field(default=None, metadata={
        "task": "devices and layout",
        "help": "started plainly: how many ranks to start on this machine (default: as many as the layout needs)"})
    metrics_file: str | None = field(default=None, metadata={
        "task": "what it says", "value": "FILE",
        "help": "where the metrics of each step go, one JSON object a line (default: SAVE/metrics.jsonl)"})
    moe_aux_loss_convention: str = field(default="megatron", metadata={
        "task": "experts",
        "choices": ("megatron", "hf"),
        "help": "megatron: a balancing loss in each layer; hf: one over all layers, as transformers computes it "
                "(docs/training.md#the-balancing-loss)"})
    no_moe_grouped_gemm: bool = field(default=False, metadata={
        "task": "experts",
        "help": "one matrix product per expert, as the engine's local experts compute (the engine has the switch on "
                "only)"})
    log_expert_load: bool = field(default=False, metadata={
        "task": "what it says",
        "help": "write each step's tokens of each expert of each layer to expert_load.jsonl beside the metrics file"})
    rank_seconds_interval: int = field(default=10, metadata={
        "task": "what it says",
        "help": "note each rank's own seconds and its waits for others in every so many steps, and which rank is "
                "slowest (0: never)"})
    rank_timeout_seconds: float = field(default=300.0, metadata={
        "task": "steps", "value": "X",
        "help": "end the run when a rank has given no sign of life for so many seconds (a stopped process, a lost "
                "node), with its name and the stacks of all (0: never)"})
    device_peak_tflops: float | None = field(default=None, metadata={
        "task": "what it says", "value": "X",
        "help": "peak of one device in TFLOP/s, for the MFU (default: known for the usual GPUs, dense bf16)"})
    max_nan_steps: int = field(default=5, metadata={
        "task": "steps",
        "help": "end the run when so many steps in a row had a loss or gradient that is not finite; each is skipped"})
    train_epochs: int | None = field(default=None, metadata={
        "task": "steps",
        "help": "in place of --train-iters: as many steps as read every row of instruction data so many times, rounded "
                "up; --lr-warmup-fraction gives the warm-up as a share of them"})
    dry_run: bool = field(default=False, metadata={
        "task": "what it says",
        "help": "resolve model and layout, say what would run, and start nothing (WORLD_SIZE gives the devices)"})
    save_total_limit: int | None = field(default=None, metadata={
        "task": "checkpoints",
        "help": "keep the last so many checkpoints; an older one is removed once a new one is whole (with "
                "--save-retain-interval its multiples are kept besides)"})
    export_hf_interval: int | None = field(default=None, metadata={
        "task": "checkpoints",
        "help": "write SAVE/hf/iter_NNNNNNN, a Hugging Face folder, every so many steps, in the background, from the "
                "checkpoint saved then: a multiple of --save-interval"})
    verify_checkpoint: bool = field(default=False, metadata={
        "task": "checkpoints",
        "help": "refuse a checkpoint that has no sums; where it has, its files are compared with them anyway"})
    no_verify_checkpoint: bool = field(default=False, metadata={
        "task": "checkpoints",
        "help": "load a checkpoint without comparing its files with their sums in integrity.json"})
    evaluation_prompts: str | None = field(default=None, metadata={
        "task": "what it says", "value": "FILE",
        "help": "file of prompts, a line each (or FILE.jsonl, as for generate), that the model continues before the "
                "first step, every --evaluation-interval steps and after the last, greedily: into the log, "
                "evaluation_prompts.jsonl beside the metrics file, and TensorBoard"})
    evaluation_interval: int | None = field(default=None, metadata={
        "task": "what it says",
        "help": "continue --evaluation-prompts and ask --eval-tasks every so many steps (default: before the first and "
                "after the last only)"})
    eval_tasks: str | None = field(default=None, metadata={
        "task": "what it says", "value": "NAMES",
        "help": "tasks of lm-eval, with commas, that the model in training is asked when --evaluation-prompts would be "
                "continued: into evaluation_tasks.jsonl beside the metrics file, the step's metrics, and TensorBoard"})
    eval_data_path: str | None = field(default=None, metadata={
        "task": "what it says", "value": "DIR",
        "help": "folder of MMLU, where mmlu is in --eval-tasks (docs/evaluation.md)"})
    eval_include_path: str | None = field(default=None, metadata={
        "task": "what it says", "value": "DIR", "help": "further tasks for --eval-tasks, as lm-eval's YAML files"})
    eval_limit: int | None = field(default=None, metadata={
        "task": "what it says", "help": "only the first so many questions of each of --eval-tasks"})
    is_instruction_dataset: bool = field(default=False, metadata={
        "task": "data",
        "help": "--data-path names instruction data: train the answers only (docs/instruction_data.md)"})
    lora_rank: int | None = field(default=None, metadata={
        "task": "adapters",
        "help": "train adapters of this rank beside the linears of --hf-checkpoint, which is frozen "
                "(docs/finetuning.md); checkpoints hold the adapters alone"})
    lora_alpha: float = field(default=16.0, metadata={
        "task": "adapters", "value": "X", "help": "adapters count alpha / rank times"})
    lora_dropout: float = field(default=0.0, metadata={
        "task": "adapters", "value": "X", "help": "dropout of the adapters' inputs, in training"})
    lora_target_modules: str = field(default=",".join(AdapterConfig.targets), metadata={
        "task": "adapters", "value": "NAMES",
        "help": "the linears with adapters, by Hugging Face's names with commas; gate is the router"})
    qlora: bool = field(default=False, metadata={
        "task": "adapters",
        "help": "hold the frozen linears, experts included, in 4 bits (NF4); packed while they are read"})
    adapter: str | None = field(default=None, metadata={
        "task": "adapters", "value": "DIR",
        "help": "adapters to start from, where --load holds none yet: a PEFT folder or an adapter checkpoint"})
    adapter_format: str = field(default="per-expert", metadata={
        "task": "adapters",
        "choices": ("per-expert", "v5"),
        "help": "the form in which --export-hf-interval writes adapters: by expert, which PEFT and vLLM read, or fused "
                "as PEFT writes on transformers 5"})
    log_level: str = field(default="info", metadata={
        "task": "what it says",
        "choices": ("error", "warning", "info", "debug"),
        "help": "what comes to the screen: errors; also warnings; also the run's summary and steps; or all that every "
                "rank prints, as it comes, and no log files"})
    tokenizer_name_or_path: str | None = field(default=None, metadata={
        "task": "data", "value": "PATH",
        "help": "accepted beside the engine's --tokenizer-model; datasets are already tokens, so nothing is loaded"})


@dataclass(frozen=True)
class EngineFlags:
    """The engine's flags that are looked at before the engine is imported; a field is `--` and its name. `named` has
    all that were given, by that name.
    """

    named: Mapping[str, Any] = field(default_factory=dict, repr=False)
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    num_virtual_stages_per_pipeline_rank: int | None = None
    num_layers_per_virtual_pipeline_stage: int | None = None
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    seq_length: int | None = None
    micro_batch_size: int | None = None
    eval_micro_batch_size: int | None = None
    global_batch_size: int | None = None
    decrease_batch_size_if_needed: bool = False
    bf16: bool = False
    fp16: bool = False
    use_distributed_optimizer: bool = False
    recompute_granularity: str | None = None
    recompute_modules: Sequence[str] = ()
    cuda_graph_impl: str = "none"
    cuda_graph_modules: Sequence[str] = ()
    data_path: Sequence[str] = ()
    train_data_path: Sequence[str] = ()
    valid_data_path: Sequence[str] = ()
    test_data_path: Sequence[str] = ()
    optimizer: str = "adam"
    load: str | None = None
    pretrained_checkpoint: str | None = None
    finetune: bool = False
    ckpt_step: int | None = None
    save: str | None = None
    save_interval: int | None = None
    tokenizer_model: str | None = None
    overlap_param_gather: bool = False
    overlap_moe_expert_parallel_comm: bool = False
    tensorboard_dir: str | None = None
    wandb_save_dir: str | None = None
    data_cache_path: str | None = None
    no_save_optim: bool = False


def parse(argv: Sequence[str]) -> tuple[Flags, EngineFlags]:
    """Every word of a command line, read once. `ConfigError` for a flag that neither we nor the engine has, for a value
    that is missing or of another type, for a flag that is cut short, and for one that cannot work here.
    """
    parser = every_flag()
    found, unknown = parser.parse_known_args(without(argv, "--tokenizer-type"))  # see pretrain._engine_args
    for word in unknown:
        raise ConfigError(f"{word} is neither a flag of {engine_flags.engine()} nor one of ours, nor a value of the "
                          f"flag before it{parser.neighbours(word)}")
    given = vars(found)
    named = {name: value for name, value in given.items() if name in engine_flags.flags()}
    engine_flags.check(named)
    early = {item.name: named["--" + item.name.replace("_", "-")] for item in dataclasses.fields(EngineFlags)
             if "--" + item.name.replace("_", "-") in named}
    return Flags(**{item.name: given[item.name] for item in dataclasses.fields(Flags)}), EngineFlags(named, **early)


def every_flag() -> Parser:
    """A parser of our flags and the engine's, which raises `ConfigError` where argparse would end the program."""
    parser = _Parser(prog="pretrain", allow_abbrev=False, add_help=False)
    group = parser.add_argument_group(engine_flags.engine())
    for flag in engine_flags.flags().values():
        flag.add_to(group)
    add_flags(parser)
    return parser


def help_of(argv: Sequence[str], program: str) -> str | None:
    """What a command line asks to be shown in place of a run: `--help` or `--help-engine`; None for a run."""
    if "-h" in argv or "--help" in argv:
        here = Path(sys.argv[0])  # a program of tools/, or the command that is installed
        script = here.suffix == ".py" and here.name != "__main__.py"
        return engine_flags.help.page(Flags, f"python {here}" if script else f"megatron-mixtral {program}")
    if "--help-engine" not in argv:
        return None
    from megatron.training.arguments import add_megatron_arguments

    return engine_flags.help.of_the_engine(add_megatron_arguments)


class _Parser(Parser):
    """Raises where argparse would end the program."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `Flags` to a parser (the engine's extra_args_provider)."""
    group = parser.add_argument_group("megatron_mixtral")
    for item in dataclasses.fields(Flags):
        flag, keywords = "--" + item.name.replace("_", "-"), {"help": item.metadata["help"]}
        if item.type is bool:
            group.add_argument(flag, action="store_true", **keywords)
        else:
            kind = next(one for one in typing.get_args(item.type) or (item.type,) if one is not type(None))
            group.add_argument(flag, type=kind, default=item.default, choices=item.metadata.get("choices"), **keywords)
    return parser


def without(argv: Sequence[str], flag: str) -> list[str]:
    """The command line without a flag and its one value."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag)
    return parser.parse_known_args(argv)[1]
