"""From a command line to a resolved run: which Mixtral, laid out how, with which engine flags.

Two steps. `resolve()` needs the standard library only and refuses what cannot work within a second, before torch is
imported or a weight is read. `engine_defaults()` then gives the engine's own parser its defaults, so that scripts do
not repeat the architecture. Flags that cannot work here, or that contradict the model, are refused by `engine_flags`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mixtral.config import CONFIG_FILE, AdapterConfig, MixtralConfig, ParallelLayout, engine, preset
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.runtime import launch
from megatron_mixtral.training import adapters, engine_flags
from megatron_mixtral.training.flags import EngineFlags, Flags, parse
from megatron_mixtral.training.start import RANDOM, weights_of


@dataclass(frozen=True)
class Run:
    """What is known before the engine is imported."""

    flags: Flags
    engine: EngineFlags
    config: MixtralConfig
    layout: ParallelLayout
    ranks: launch.Launch
    start: str  # where the weights come from, as a sentence for the log
    load_hf: bool  # whether --hf-checkpoint is to be read, i.e. no checkpoint of the run itself is there, or adapters
    adapter: AdapterConfig | None = None  # what is trained, if not the whole model

    @property
    def model(self) -> str:
        """What is trained, in words."""
        total, active = (f"{count / 1e6:.1f} M" for count in (
            self.config.total_parameters, self.config.active_parameters))
        if self.config.dense_config is not None:
            return f"{self.config.model_type} of {total} parameters, as a Mixtral of one expert"
        return f"Mixtral of {total} parameters ({active} active)"

    def __str__(self) -> str:
        return (f"{self.model} on {self.layout}, {self.layout.world} device(s), data parallel "
                f"{self.layout.data_parallel}; start: {self.start}")


def resolve(argv: list[str], environ: Mapping[str, str]) -> Run:
    """Resolve model, layout and ranks. Raises `ConfigError` for anything that cannot work."""
    flags, given = parse(argv)
    _check_saving(flags, given)
    _check_epochs(flags, given)
    config = _one_config(flags, given)
    engine_flags.check_model(given.named, config)
    layout = _layout(given, config).validate(config)
    ranks = launch.decide(environ, layout.min_world, flags.nproc)
    layout = dataclasses.replace(layout, world=ranks.world)
    layout.validate(config, world=ranks.changed_by)
    _check_routers(flags, given, config, layout)
    _check_overlap(flags, given, layout)
    if given.seq_length is not None and given.seq_length > config.max_position_embeddings:
        raise ConfigError(f"--seq-length {given.seq_length} is longer than the model's max_position_embeddings "
                          f"{config.max_position_embeddings}; shorten it, or change the model's config.json")
    if given.optimizer == "sgd" and given.use_distributed_optimizer:
        raise ConfigError("--optimizer sgd with --use-distributed-optimizer: the engine shares out the state of Adam "
                          "only; drop one of the two flags")
    if flags.verify_checkpoint and flags.no_verify_checkpoint:
        raise ConfigError("--verify-checkpoint and --no-verify-checkpoint say the opposite; drop one of them")
    start, load_hf = weights_of(flags, given)
    if start == RANDOM and "--no-initialization" in given.named:
        raise ConfigError("--no-initialization leaves what happens to lie in memory where no weights are loaded: "
                          "drop it, or give --load, --pretrained-checkpoint or --hf-checkpoint")
    adapter = adapters.of_flags(flags, config, layout)
    if adapter is not None:
        start, load_hf = f"{adapters.described(adapter)}; {start}", True
    return Run(flags, given, config, layout, ranks, start, load_hf, adapter)


def _check_routers(flags: Flags, given: EngineFlags, config: MixtralConfig, layout: ParallelLayout) -> None:
    if flags.log_expert_load and not (flags.metrics_file or given.save):
        raise ConfigError("--log-expert-load writes beside the metrics of each step, and there is no place for these: "
                          "give --save or --metrics-file")
    if flags.moe_aux_loss_convention == "hf" and layout.pp > 1:
        raise ConfigError(
            "--moe-aux-loss-convention hf pools the loss over all layers, and --pipeline-model-parallel-size "
            f"{layout.pp} spreads them over ranks that work on different micro-batches: use the convention megatron, "
            f"where --moe-aux-loss-coeff {aux_loss_coefficient(config, 'megatron'):g} (its default) is as strong")
    if given.cuda_graph_impl != "none" and list(given.cuda_graph_modules) != ["attn"]:
        raise ConfigError(f"--cuda-graph-impl {given.cuda_graph_impl} would capture the routers, whose loads and "
                          "losses are noted by Python code that a graph does not run again: add --cuda-graph-modules "
                          "attn, or leave the flag out")


def _check_overlap(flags: Flags, given: EngineFlags, layout: ParallelLayout) -> None:
    """`ConfigError` where the engine has no schedule that runs two micro-batches at a time."""
    if not given.overlap_moe_expert_parallel_comm:
        return
    dispatcher = given.named.get("--moe-token-dispatcher-type", "alltoall")
    wrong = {
        "--recompute-granularity full, of whole layers, which cannot be taken apart: use selective, with "
        "--recompute-modules moe_act layernorm": given.recompute_granularity == "full",
        "--recompute-modules moe, which repeats the exchange: recompute moe_act instead":
            "moe" in given.recompute_modules,
        "weights in fp32: give --bf16 or --fp16": not (given.bf16 or given.fp16),
        "one expert-parallel rank, which exchanges nothing: give --expert-model-parallel-size 2 or more":
            layout.ep == 1,
        f"pipeline parallel {layout.pp} without virtual stages: give --num-virtual-stages-per-pipeline-rank":
            layout.pp > 1 and layout.vpp == 1,
        f"--moe-token-dispatcher-type {dispatcher}: use alltoall": dispatcher != "alltoall",
        "--moe-aux-loss-convention hf, which needs all layers of one micro-batch at a time: use megatron":
            flags.moe_aux_loss_convention == "hf",
    }
    for what, is_so in wrong.items():
        if is_so:
            raise ConfigError(f"--overlap-moe-expert-parallel-comm does not go together with {what}, or drop the flag")


def _check_saving(flags: Flags, given: EngineFlags) -> None:
    if flags.save_total_limit is not None and flags.save_total_limit < 1:
        raise ConfigError(f"--save-total-limit {flags.save_total_limit} would remove every checkpoint; give 1 or more")
    every, export = given.save_interval, flags.export_hf_interval
    if export is not None and (given.save is None or every is None):
        raise ConfigError(f"--export-hf-interval {export} converts saved checkpoints: give --save and --save-interval")
    if export is not None and (export < 1 or export % every):
        raise ConfigError(f"--export-hf-interval {export} is not a multiple of --save-interval {every}; an export is "
                          "made of a checkpoint that is saved at the same step")


def _check_epochs(flags: Flags, given: EngineFlags) -> None:
    if flags.train_epochs is None:
        return
    said = f"--train-epochs {flags.train_epochs}"
    if flags.train_epochs < 1:
        raise ConfigError(f"{said} trains nothing; give 1 or more")
    for other in ("--train-iters", "--train-samples"):
        if other in given.named:
            raise ConfigError(f"{said} and {other} {given.named[other]} both say how long to train; drop one of them")
    if not flags.is_instruction_dataset:
        raise ConfigError(f"{said} counts the rows of instruction data; plain text has none, for samples are cut out "
                          "of it at any place: give --train-iters (tokens x epochs / (--global-batch-size x "
                          "--seq-length)), or --is-instruction-dataset")
    if given.seq_length is None or given.micro_batch_size is None:
        raise ConfigError(f"{said} needs --seq-length and --micro-batch-size, as every run does")


_NOT_COMPUTED = ("max_position_embeddings", "router_aux_loss_coef", "initializer_range", "bos_token_id", "eos_token_id",
                 "dense_config")  # of which the model's type is compared


def _one_config(flags: Flags, given: EngineFlags) -> MixtralConfig:
    """The architecture from whatever names one; all that do must agree."""
    found: list[tuple[str, MixtralConfig]] = []
    for name in ("load", "pretrained_checkpoint"):
        directory = getattr(given, name)
        if directory and (Path(directory) / CONFIG_FILE).is_file():
            found.append((f"--{name.replace('_', '-')} {directory}", MixtralConfig.from_checkpoint(directory)))
    if flags.hf_checkpoint:
        found.append((f"--hf-checkpoint {flags.hf_checkpoint}", MixtralConfig.from_hf_dir(flags.hf_checkpoint)))
    if flags.model:
        found.append((f"--model {flags.model}", preset(flags.model)))
    if not found:
        raise ConfigError("no model is given: expected --model PRESET, --hf-checkpoint DIR, or a --load DIR that "
                          f"holds {CONFIG_FILE}")
    (first_name, first), *others = found
    for other_name, other in others:
        for name in ("model_type", *(item.name for item in dataclasses.fields(MixtralConfig))):
            ours, theirs = getattr(first, name), getattr(other, name)
            if name not in _NOT_COMPUTED and ours != theirs:
                raise ConfigError(f"{first_name} has {name} {ours}, {other_name} has {theirs}: "
                                  "they are different models; drop the flag that names the wrong one")
    return first


def _layout(given: EngineFlags, config: MixtralConfig) -> ParallelLayout:
    vpp = given.num_virtual_stages_per_pipeline_rank or 1
    per_chunk = given.num_layers_per_virtual_pipeline_stage
    pp = given.pipeline_model_parallel_size
    if per_chunk is not None:
        per_stage = config.num_hidden_layers // pp
        if per_chunk < 1 or per_stage % per_chunk:
            raise ConfigError(f"--num-layers-per-virtual-pipeline-stage {per_chunk} does not divide the {per_stage} "
                              f"layers of a pipeline stage ({config.num_hidden_layers} layers / pp {pp})")
        vpp = per_stage // per_chunk
    return ParallelLayout(
        tp=given.tensor_model_parallel_size, pp=pp, vpp=vpp, ep=given.expert_model_parallel_size,
        etp=given.expert_tensor_parallel_size, cp=given.context_parallel_size,
        first=given.decoder_first_pipeline_num_layers, last=given.decoder_last_pipeline_num_layers)


# -- the engine's flags ----------------------------------------------------------------------------------


def aux_loss_coefficient(config: MixtralConfig, convention: str) -> float:
    """`--moe-aux-loss-coeff` that balances as strongly as Hugging Face's `router_aux_loss_coef` c does.

    HF pools its loss over all layers and counts each of the top-k choices; the engine adds one loss a layer, normalised
    by top-k. Near balance, c is c * top-k / layers there (docs/training.md derives it).
    """
    if convention == "hf":
        return config.router_aux_loss_coef
    return config.router_aux_loss_coef * config.num_experts_per_tok / config.num_hidden_layers


def engine_defaults(run: Run, transformer_impl: str, collectives: str) -> dict[str, Any]:
    """Defaults for the engine's parser: the architecture, and choices a user may override by the engine's flags."""
    config, has_te = run.config, transformer_impl == "transformer_engine"
    defaults = {
        **engine.architecture_args(config),
        # Answers differ in length: every trained token of a global batch counts the same, in whichever micro-batch.
        "calculate_per_token_loss": run.flags.is_instruction_dataset,
        "init_method_std": config.initializer_range,
        "make_vocab_size_divisible_by": 1,
        "moe_aux_loss_coeff": 0.0 if run.adapter is not None else aux_loss_coefficient(
            config, run.flags.moe_aux_loss_convention),
        "moe_router_load_balancing_type": "aux_loss",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
        "transformer_impl": "local" if run.adapter is not None else transformer_impl,
        "distributed_backend": collectives,
        # The engine's MoE layer refuses tensor parallelism without sequence parallelism.
        "sequence_parallel": run.layout.tp > 1,
        # Checkpoints that continue on any layout; rank directories are recognised when loading.
        "ckpt_format": "torch_dist",
        "auto_detect_ckpt_format": True,
        "dist_ckpt_optim_fully_reshardable": True,
        # A tensor that the run needs and the checkpoint lacks is an error (the engine's default only assumes there is
        # none). "raise_all" would also refuse the engine's own bookkeeping of another layout.
        "dist_ckpt_strictness": "raise_unexpected",
        # SIGTERM (and SIGINT, see training/pretrain.py) saves and ends; --async-save without nvidia-resiliency-ext.
        "exit_signal_handler": True,
        "async_strategy": "mcore",
        "use_persistent_ckpt_worker": True,
        # A gradient that is not finite skips the step (training/metrics/writer.py counts and stops); the engine's
        # own check would end the run at the first.
        "check_for_nan_in_loss_and_grad": False,
        "create_attention_mask_in_dataloader": False,
        "eval_interval": 1000,  # the engine divides by it and has no default
        # Data sets hold tokens; only the vocabulary's size and the end-of-document token matter here.
        "tokenizer_type": "NullTokenizer",
        "null_tokenizer_eod_id": config.eos_token_id,
    }
    if not has_te:
        defaults.update(masked_softmax_fusion=False, apply_rope_fusion=False, no_persist_layer_norm=True)
    if collectives == "gloo":
        # Products into the engine's gradient buffer (runtime/gpu/products.py): of 16-bit types a CPU has none.
        defaults.update(gradient_accumulation_fusion=False)
        # Worker processes of the loader would be forked copies of each rank; a laptop has better uses for the memory.
        defaults.update(num_workers=0)
    return defaults
