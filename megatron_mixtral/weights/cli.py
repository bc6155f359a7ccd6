"""The weights commands: convert, megatron_to_hf, inspect, select_experts, upcycle.

Each takes the arguments after its name and returns an exit status; errors are `MixtralError`s. What can be refused from
the arguments and a config.json alone is refused before anything is opened. torch is not imported, except to cast.
"""

import argparse
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from megatron_mixtral.command_line import Parser
from megatron_mixtral.config import TARGET_FLAGS, MixtralConfig, ParallelLayout
from megatron_mixtral.disk import human_size
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.weights import conversion, inspection
from megatron_mixtral.weights.adapters import FORMS
from megatron_mixtral.weights.dtypes import FLOATS, SHORT, type_name
from megatron_mixtral.weights.edits import SelectedExperts, UpcycledSource, busiest
from megatron_mixtral.weights.files import atomic
from megatron_mixtral.weights.formats import directory
from megatron_mixtral.weights.opening import open_megatron, open_sink, open_source
from megatron_mixtral.weights.plan import all_plans, describe, padded_vocabulary
from megatron_mixtral.weights.protocols import TensorSink, TensorSource

logger = logging.getLogger(__name__)

EXPORT_FOLDER = "mg2hg"
STEP = 2.0  # seconds between two lines of progress
SOURCE_FLAGS = {"tp": "--tensor-parallel-size", "pp": "--pipeline-parallel-size", "ep": "--expert-parallel-size"}


def convert(argv: Sequence[str]) -> int:
    """`tools/checkpoint/util.py`: from any format to any other, under Megatron's names of flags."""
    parser = Parser(
        description="Convert Mixtral weights: Hugging Face to Megatron, Megatron to another layout, Megatron to "
                    "Hugging Face. Nothing is written under its final name before it is whole.")
    parser.add_argument("--model-type", choices=["GPT"], default="GPT", help="Mixtral is a GPT; kept for old scripts")
    parser.add_argument("--loader", choices=["mixtral_hf", "mixtral_mg", "peft"], required=True,
                        help="what --load-dir is: a Hugging Face directory (of a Mixtral, or of a Mistral, Llama or "
                             "InternLM2, which is a Mixtral of one expert and is given back as what it was), a "
                             "Megatron checkpoint of either format, or adapters in PEFT's form")
    parser.add_argument("--saver", choices=["mixtral"], default="mixtral")
    parser.add_argument("--save-model-type", choices=["megatron", "huggingface", "peft"], default="megatron",
                        help="peft: of adapters, which a checkpoint of a --lora-rank run holds")
    parser.add_argument("--adapter-format", choices=FORMS, default=FORMS[0],
                        help="with peft: by expert, which PEFT and vLLM read, or fused, as on transformers 5")
    parser.add_argument("--base-dir", type=Path, help="with --loader peft: the adapters' base, if they do not say it")
    parser.add_argument("--load-dir", type=Path, required=True)
    parser.add_argument("--save-dir", type=Path, required=True,
                        help=f"for huggingface: the result goes to SAVE_DIR/{EXPORT_FOLDER}/ (replacing it); "
                             "a config.json in SAVE_DIR is the template")
    parser.add_argument("--tokenizer-model", type=Path, help="tokenizer.model to check and to copy beside the weights")
    for axis in ("tp", "pp", "ep"):
        parser.add_argument(TARGET_FLAGS[axis], type=int, dest=axis,
                            help="default: as in the source if that is Megatron, else 1")
    parser.add_argument(TARGET_FLAGS["etp"], type=int, dest="etp", help="default: the tensor parallel size")
    parser.add_argument(TARGET_FLAGS["vpp"], type=int, dest="vpp", default=1, help="model chunks of a pipeline rank")
    parser.add_argument(TARGET_FLAGS["first"], type=int, dest="first", help="layers of an uneven first stage")
    parser.add_argument(TARGET_FLAGS["last"], type=int, dest="last", help="layers of an uneven last stage")
    parser.add_argument("--make-vocab-size-divisible-by", "--target-vocab-padding", type=int,
                        help="pad the vocabulary with zero rows to a multiple of this (1) x tensor parallel size")
    _add_common(parser)
    parser.add_argument("--target-ckpt-format", choices=["torch", "torch_dist"], default="torch",
                        help="rank directories, for the layout given; or a distributed checkpoint, for any layout")
    parser.add_argument("--no-load-optim", action="store_true",
                        help="leave the optimizer and the counters of a run's distributed checkpoint behind; else a "
                             "distributed checkpoint made of it takes them over")
    parser.add_argument("--overwrite", action="store_true", help="replace a --save-dir that is not empty")
    parser.add_argument("--max-queue-size", type=int, help="ignored: there is no queue")
    parser.add_argument("--megatron-path", help="ignored: megatron is not needed to convert")
    args = parser.parse_args(argv)
    _need_directory(args.load_dir, "--load-dir")
    if "peft" in (args.loader, args.save_model_type):
        return _convert_adapters(args)
    from_hf, to_megatron = args.loader == "mixtral_hf", args.save_model_type == "megatron"
    config = MixtralConfig.from_hf_dir(args.load_dir) if from_hf else _identity(args.load_dir)
    if to_megatron and config is not None:
        _layout(args, None).validate(config, TARGET_FLAGS)
    tokenizer = _tokenizer(args.tokenizer_model, config)
    source = (open_source(args.load_dir) if from_hf else
              open_megatron(args.load_dir, compare_copies=not args.no_checking))
    if not to_megatron:
        template = args.save_dir if (args.save_dir / "config.json").exists() else None
        return _run(source, open_sink(args.save_dir / EXPORT_FOLDER, template=template, replace=True,
                                      max_shard_size=args.max_shard_size), args, tokenizer)
    layout = _layout(args, getattr(source, "layout", None)).validate(source.config, TARGET_FLAGS)
    if args.dry_run and args.target_ckpt_format == "torch":
        print(_shards(source.config, layout, args))
    return _run(source, open_sink(args.save_dir, args.target_ckpt_format, layout, replace=args.overwrite,
                                  vocab_divisible_by=args.make_vocab_size_divisible_by,
                                  carry_state=not args.no_load_optim), args, tokenizer)


def megatron_to_hf(argv: Sequence[str]) -> int:
    """`tools/checkpoint/convert_megatron_to_hf_mixtral.py`."""
    parser = Parser(description="Convert a Megatron checkpoint of a Mixtral to Hugging Face.")
    parser.add_argument("--megatron-checkpoint-path", type=Path, required=True)
    parser.add_argument("--huggingface-config-path", type=Path,
                        help="folder whose config.json, tokenizer and generation files are taken over")
    parser.add_argument("--huggingface-checkpoint-path", type=Path, required=True,
                        help=f"where to write; if it already holds files, the result goes to {EXPORT_FOLDER}/ below it")
    for axis, flag in SOURCE_FLAGS.items():
        parser.add_argument(flag, type=int, dest=axis, help="compared with the checkpoint, which knows its layout")
    _add_common(parser)
    args = parser.parse_args(argv)
    _need_directory(args.megatron_checkpoint_path, "--megatron-checkpoint-path")
    if args.huggingface_config_path is not None:
        _need_directory(args.huggingface_config_path, "--huggingface-config-path")
    source = open_megatron(args.megatron_checkpoint_path, compare_copies=not args.no_checking)
    layout = getattr(source, "layout", None)
    for axis, flag in SOURCE_FLAGS.items():
        asked = getattr(args, axis)
        if layout is not None and asked not in (None, getattr(layout, axis)):
            raise CheckpointError(f"{flag} {asked} contradicts the checkpoint {source.where}, which has {axis} "
                                  f"{getattr(layout, axis)} (layout {layout}); leave the flag out or correct it")
    target = args.huggingface_checkpoint_path
    below = not atomic.is_empty(target)
    if below:
        target = target / EXPORT_FOLDER
        logger.warning("%s is not empty and is left as it is; writing to %s", target.parent, target)
    return _run(source, open_sink(target, template=args.huggingface_config_path, replace=below,
                                  max_shard_size=args.max_shard_size), args)


def inspect(argv: Sequence[str]) -> int:
    """`tools/checkpoint/inspect_checkpoint.py`: 0 for a whole directory, 1 for anything else."""
    parser = Parser(description="Say what a model or checkpoint directory is, and if it is whole.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--deep", action="store_true",
                        help="read every tensor; compare with the checksums of a conversion made with --verify")
    args = parser.parse_args(argv)
    found = inspection.inspect(args.directory, deep=args.deep)
    print(found)
    return 0 if found.problem is None else 1


def select_experts(argv: Sequence[str]) -> int:
    """`tools/checkpoint/select_experts.py`: keep some experts of every layer, for example 8x7B to 4x7B."""
    parser = Parser(description="Keep some experts of every layer of a Mixtral.")
    _add_edit(parser, "Hugging Face or Megatron", "Hugging Face")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--experts", type=int, nargs="+", help="their numbers, the same in every layer")
    which.add_argument("--router-load", type=Path,
                       help="JSON: for each layer the tokens of each expert; or a run's JSON lines with expert_load")
    parser.add_argument("--keep", type=int, default=4, help="with --router-load: how many, the busiest of each layer")
    args = parser.parse_args(argv)
    whole = open_source(args.load_dir)
    return _edit(SelectedExperts(whole, args.experts or busiest(args.router_load, args.keep, whole.config)), args)


def upcycle(argv: Sequence[str]) -> int:
    """`tools/checkpoint/upcycle.py`: a dense model's MLP becomes every expert, the router is new."""
    parser = Parser(description="Make a Mixtral out of a dense Mistral, Llama or InternLM2.")
    _add_edit(parser, "Hugging Face directory of the dense model", "Hugging Face directory of the Mixtral")
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--moe-router-topk", type=int, default=2, help="experts that a token meets")
    parser.add_argument("--router-std", type=float, default=0.02, help="standard deviation of the new router")
    parser.add_argument("--expert-noise", type=float, default=0.0,
                        help="noise of each expert, as a share of its matrices' root mean square; 0: exact copies")
    parser.add_argument("--seed", type=int, default=1234, help="of the router and of the noise")
    args = parser.parse_args(argv)
    return _edit(UpcycledSource(args.load_dir, args.num_experts, args.moe_router_topk, seed=args.seed,
                                router_std=args.router_std, expert_noise=args.expert_noise), args)


def _convert_adapters(args: argparse.Namespace) -> int:
    """`convert` where one side is PEFT's form; the other may be a distributed checkpoint, which has no layout."""
    base = None if args.base_dir is None else MixtralConfig.from_hf_dir(args.base_dir)
    source = open_source(args.load_dir, base=base)
    form = "peft" if args.save_model_type == "peft" else "torch_dist"
    if args.save_model_type == "huggingface":
        raise ConfigError("adapters alone are no model: give --save-model-type peft or megatron, or merge them into "
                          "their base with merge-lora")
    return _run(source, open_sink(args.save_dir, form, replace=args.overwrite, adapter_format=args.adapter_format),
                args)


# -- Parts -------------------------------------------------------------------------------------------------


def _add_common(parser: argparse.ArgumentParser) -> None:
    """What both converting commands have."""
    parser.add_argument("--params-dtype", choices=[*SHORT, *SHORT.values()],
                        help="cast; default: keep the source's types")
    parser.add_argument("--max-shard-size", default="5GB", help="of a safetensors file")
    parser.add_argument("--jobs", type=int, help="threads that write; default: one for each core")
    parser.add_argument("--resume", action="store_true",
                        help="keep the finished files of a killed conversion of the same source to the same target")
    parser.add_argument("--verify", action="store_true",
                        help="read the result back and compare checksums with the source's, before it gets its name")
    parser.add_argument("--check-finite", action="store_true", help="name the tensors that hold NaN or Inf")
    parser.add_argument("--dry-run", action="store_true", help="show what would be written, and write nothing")
    parser.add_argument("--no-checking", action="store_true",
                        help="do not compare the copies that several ranks hold of the same weights")


def _add_edit(parser: argparse.ArgumentParser, source: str, target: str) -> None:
    """What both editing commands have."""
    parser.add_argument("--load-dir", type=Path, required=True, help=source)
    parser.add_argument("--save-dir", type=Path, required=True, help=target)
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--verify", action="store_true", help="read the result back and compare checksums")
    parser.add_argument("--overwrite", action="store_true")


def _edit(source: TensorSource, args: argparse.Namespace) -> int:
    sink = open_sink(args.save_dir, max_shard_size=args.max_shard_size, replace=args.overwrite)
    print(conversion.convert(source, sink, verify=args.verify))
    return 0


def _run(source: TensorSource, sink: TensorSink, args: argparse.Namespace, tokenizer: Iterable[Path] = ()) -> int:
    """Convert, or say what would be done, by the arguments of `_add_common`."""
    if args.jobs is not None and args.jobs < 1:
        raise ConfigError(f"--jobs must be positive, found {args.jobs}")
    if args.dry_run:
        print(conversion.preview(source, sink, dtype=args.params_dtype, jobs=args.jobs, companions=tokenizer))
        return 0
    print(conversion.convert(source, sink, dtype=args.params_dtype, companions=tokenizer, jobs=args.jobs,
                             resume=args.resume, verify=args.verify, check_finite=args.check_finite,
                             progress=_progress()))
    return 0


def _progress() -> Callable[[int, int], None]:
    """Logs how far a conversion is, every few seconds."""
    started = last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= STEP:
            last, rate = now, done / (now - started)
            logger.info("%d%%: %s of %s, %s/s, %.0f s left", 100 * done // total, human_size(done), human_size(total),
                        human_size(int(rate)), (total - done) / rate)

    return progress


def _identity(load_dir: Path) -> MixtralConfig | None:
    """The architecture, where a JSON file says it. An iteration's own directory may be given; the file is beside it."""
    return directory.identity(load_dir if directory.is_checkpoint(load_dir) else load_dir.parent)


def _layout(args: argparse.Namespace, source: ParallelLayout | None) -> ParallelLayout:
    """The target layout; sizes that are not given are the source's, or 1 where there is none (yet)."""
    sizes = {axis: getattr(args, axis) if getattr(args, axis) is not None else getattr(source, axis, 1)
             for axis in ("tp", "pp", "ep")}
    if args.make_vocab_size_divisible_by is not None and args.make_vocab_size_divisible_by < 1:
        raise ConfigError(f"--make-vocab-size-divisible-by must be positive, found {args.make_vocab_size_divisible_by}")
    if source is None and args.loader == "mixtral_mg":  # not known yet: check only what is given
        return ParallelLayout(**sizes, etp=args.etp)
    return ParallelLayout(**sizes, etp=args.etp, vpp=args.vpp, first=args.first, last=args.last)


def _shards(config: MixtralConfig, layout: ParallelLayout, args: argparse.Namespace) -> str:
    """What each shard of a layout will hold."""
    padded = padded_vocabulary(config, layout, args.make_vocab_size_divisible_by or 1)
    plans = all_plans(config, layout, padded)
    size = 2 if args.params_dtype is None else FLOATS[type_name(args.params_dtype)].itemsize
    return (f"{config.total_parameters:,} parameters, layout {layout}, vocabulary {config.vocab_size} "
            f"padded to {padded}\n" + describe(plans, size))


def _need_directory(path: Path, flag: str) -> None:
    if not path.is_dir():
        raise CheckpointError(f"{flag} {path} does not exist or is not a directory")


def _tokenizer(path: Path | None, config: MixtralConfig | None) -> list[Path]:
    """The tokenizer file to copy, checked. Raises `ConfigError` for one that is missing or larger than the model."""
    if path is None:
        return []
    if path.is_dir():
        path = path / "tokenizer.model"
    if not path.is_file():
        beside = path.with_name("tokenizer.json")
        raise ConfigError(f"--tokenizer-model {path} does not exist" + (
            f"; the folder's {beside.name} comes along by itself: leave the flag out" if beside.is_file() else ""))
    if path.suffix != ".model" or config is None:
        return [path]
    try:
        import sentencepiece
    except ImportError:
        logger.warning("sentencepiece is not installed; %s is copied without being checked", path)
        return [path]
    try:
        size = sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"--tokenizer-model {path} is not a sentencepiece model: {error}") from None
    if size > config.vocab_size:
        raise ConfigError(f"--tokenizer-model {path} has {size} tokens, more than the model's vocab_size "
                          f"{config.vocab_size}; it is the tokenizer of another model")
    return [path]
