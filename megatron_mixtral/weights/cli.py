"""The conversion command lines: `tools/checkpoint/util.py` and `tools/checkpoint/convert_megatron_to_hf_mixtral.py`.

Each function takes the arguments and returns the text to show; errors are `MixtralError`s. What can be refused from
the arguments and a config.json alone is refused before anything is opened. torch is not imported, except to cast.
"""

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mixtral.config import CONFIG_FILE, TARGET_FLAGS, MixtralConfig, ParallelLayout
from megatron_mixtral.errors import CheckpointError, ConfigError
from megatron_mixtral.weights.files.atomic import is_empty
from megatron_mixtral.weights.plan import all_plans, check_complete, describe, human_size, padded_vocabulary

if TYPE_CHECKING:
    from megatron_mixtral.weights.protocols import TensorSink, TensorSource

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
EXPORT_FOLDER = "mg2hg"
BYTES = {"fp32": 4, "float32": 4}  # of an element, by --params-dtype; 2 for the rest
STEP = 2.0  # seconds between two lines of progress


def util_parser() -> argparse.ArgumentParser:
    """The arguments of `tools/checkpoint/util.py`, under Megatron's names."""
    parser = argparse.ArgumentParser(
        description="Convert Mixtral weights: Hugging Face to Megatron, Megatron to another layout, Megatron to "
                    "Hugging Face. Nothing is written under its final name before it is whole.")
    parser.add_argument("--model-type", choices=["GPT"], default="GPT", help="Mixtral is a GPT; kept for old scripts")
    parser.add_argument("--loader", choices=["mixtral_hf", "mixtral_mg"], required=True,
                        help="what --load-dir is: a Hugging Face directory, or a Megatron checkpoint of either format")
    parser.add_argument("--saver", choices=["mixtral"], default="mixtral")
    parser.add_argument("--save-model-type", choices=["megatron", "huggingface"], default="megatron")
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
    return parser


def util(argv: Sequence[str] | None = None) -> str:
    """Run `tools/checkpoint/util.py`. Raises `MixtralError`."""
    args = util_parser().parse_args(argv)
    _need_directory(args.load_dir, "--load-dir")
    config = _known_config(args)
    to_megatron = args.save_model_type == "megatron"
    if to_megatron and config is not None:
        _layout(args, None).validate(config, TARGET_FLAGS)
    tokenizer = _tokenizer(args.tokenizer_model, config)

    from megatron_mixtral.weights.convert import convert, open_megatron
    from megatron_mixtral.weights.formats.hf_source import HFSource
    from megatron_mixtral.weights.preview import preview

    source = HFSource(args.load_dir) if args.loader == "mixtral_hf" else open_megatron(
        args.load_dir, compare_copies=not args.no_checking)
    if not to_megatron:
        target = args.save_dir / EXPORT_FOLDER
        template = args.save_dir if (args.save_dir / "config.json").exists() else None
        return _export(source, target, template, args, tokenizer, replace=True)

    layout = _layout(args, getattr(source, "layout", None)).validate(source.config, TARGET_FLAGS)
    sink = _megatron_sink(source, layout, args)
    if args.dry_run:
        shards = _describe(source.config, layout, args) + "\n" if args.target_ckpt_format == "torch" else ""
        return shards + preview(source, sink, dtype=args.params_dtype, jobs=args.jobs, companions=tokenizer)
    return str(convert(source, sink, companions=tokenizer, **_options(args)))


def megatron_to_hf_parser() -> argparse.ArgumentParser:
    """The arguments of `tools/checkpoint/convert_megatron_to_hf_mixtral.py`."""
    parser = argparse.ArgumentParser(description="Convert a Megatron checkpoint of a Mixtral to Hugging Face.")
    parser.add_argument("--megatron-checkpoint-path", type=Path, required=True)
    parser.add_argument("--huggingface-config-path", type=Path,
                        help="folder whose config.json, tokenizer and generation files are taken over")
    parser.add_argument("--huggingface-checkpoint-path", type=Path, required=True,
                        help=f"where to write; if it already holds files, the result goes to {EXPORT_FOLDER}/ below it")
    for axis, flag in (("tp", "--tensor-parallel-size"), ("pp", "--pipeline-parallel-size"),
                       ("ep", "--expert-parallel-size")):
        parser.add_argument(flag, type=int, dest=axis, help="compared with the checkpoint, which knows its layout")
    _add_common(parser)
    return parser


def export(argv: Sequence[str] | None = None) -> str:
    """Run `tools/checkpoint/convert_megatron_to_hf_mixtral.py`. Raises `MixtralError`."""
    args = megatron_to_hf_parser().parse_args(argv)
    _need_directory(args.megatron_checkpoint_path, "--megatron-checkpoint-path")
    if args.huggingface_config_path is not None:
        _need_directory(args.huggingface_config_path, "--huggingface-config-path")

    from megatron_mixtral.weights.convert import open_megatron

    source = open_megatron(args.megatron_checkpoint_path, compare_copies=not args.no_checking)
    layout = getattr(source, "layout", None)
    for axis, flag in (("tp", "--tensor-parallel-size"), ("pp", "--pipeline-parallel-size"),
                       ("ep", "--expert-parallel-size")):
        asked = getattr(args, axis)
        if layout is not None and asked not in (None, getattr(layout, axis)):
            raise CheckpointError(f"{flag} {asked} contradicts the checkpoint {source.where}, which has {axis} "
                                  f"{getattr(layout, axis)} (layout {layout}); leave the flag out or correct it")
    target = args.huggingface_checkpoint_path
    below = not is_empty(target)
    if below:
        target = target / EXPORT_FOLDER
        logger.warning("%s is not empty and is left as it is; writing to %s", target.parent, target)
    return _export(source, target, args.huggingface_config_path, args, [], replace=below)


def convert(argv: Sequence[str]) -> int:
    """`util`, with its text printed."""
    print(util(argv))
    return 0


def megatron_to_hf(argv: Sequence[str]) -> int:
    """`export`, with its text printed."""
    print(export(argv))
    return 0


def inspect(argv: Sequence[str]) -> int:
    """Print what a directory is; 0 where it is whole, else 1."""
    parser = argparse.ArgumentParser(description="Say what a model or checkpoint directory is, and if it is whole.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--deep", action="store_true",
                        help="read every tensor; compare with the checksums of a conversion made with --verify")
    args = parser.parse_args(argv)
    from megatron_mixtral.weights import inspection

    found = inspection.inspect(args.directory, deep=args.deep)
    print(found)
    return 0 if found.problem is None else 1


def select_experts(argv: Sequence[str]) -> int:
    """Keep some experts of every layer."""
    from megatron_mixtral.weights.convert import convert, open_source
    from megatron_mixtral.weights.edits.select_experts import SelectedExperts, busiest
    from megatron_mixtral.weights.formats.hf_sink import HFSink

    parser = argparse.ArgumentParser(description="Keep some experts of every layer of a Mixtral.")
    parser.add_argument("--load-dir", type=Path, required=True, help="Hugging Face or Megatron")
    parser.add_argument("--save-dir", type=Path, required=True, help="Hugging Face")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--experts", type=int, nargs="+", help="their numbers, the same in every layer")
    which.add_argument("--router-load", type=Path,
                       help="JSON: for each layer the tokens of each expert; or a run's JSON lines with expert_load")
    parser.add_argument("--keep", type=int, default=4, help="with --router-load: how many, the busiest of each layer")
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--verify", action="store_true", help="read the result back and compare checksums")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args(argv)
    whole = open_source(args.load_dir)
    source = SelectedExperts(whole, args.experts or busiest(args.router_load, args.keep, whole.config))
    sink = HFSink(args.save_dir, source.config, max_shard_size=args.max_shard_size, replace=args.overwrite)
    print(convert(source, sink, verify=args.verify))
    return 0


def upcycle(argv: Sequence[str]) -> int:
    """Make a Mixtral of a dense model."""
    from megatron_mixtral.weights.convert import convert
    from megatron_mixtral.weights.edits.upcycle import UpcycledSource
    from megatron_mixtral.weights.formats.hf_sink import HFSink

    parser = argparse.ArgumentParser(description="Make a Mixtral out of a dense Mistral or Llama.")
    parser.add_argument("--load-dir", type=Path, required=True, help="Hugging Face directory of the dense model")
    parser.add_argument("--save-dir", type=Path, required=True, help="Hugging Face directory of the Mixtral")
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--moe-router-topk", type=int, default=2, help="experts that a token meets")
    parser.add_argument("--router-std", type=float, default=0.02, help="standard deviation of the new router")
    parser.add_argument("--expert-noise", type=float, default=0.0,
                        help="noise of each expert, as a share of its matrices' root mean square; 0: exact copies")
    parser.add_argument("--seed", type=int, default=1234, help="of the router and of the noise")
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--verify", action="store_true", help="read the result back and compare checksums")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args(argv)
    source = UpcycledSource(args.load_dir, args.num_experts, args.moe_router_topk, seed=args.seed,
                            router_std=args.router_std, expert_noise=args.expert_noise)
    sink = HFSink(args.save_dir, source.config, max_shard_size=args.max_shard_size, replace=args.overwrite)
    print(convert(source, sink, verify=args.verify))
    return 0


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params-dtype", choices=["fp32", "fp16", "bf16", "float32", "float16", "bfloat16"],
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


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `convert` that both programs have."""
    if args.jobs is not None and args.jobs < 1:
        raise ConfigError(f"--jobs must be positive, found {args.jobs}")
    started, last = time.monotonic(), time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= STEP:
            last, rate = now, done / (now - started)
            logger.info("%d%%: %s of %s, %s/s, %.0f s left", 100 * done // total, human_size(done), human_size(total),
                        human_size(int(rate)), (total - done) / rate)

    return {"dtype": args.params_dtype, "jobs": args.jobs, "resume": args.resume, "verify": args.verify,
            "check_finite": args.check_finite, "progress": progress}


# -- Parts -------------------------------------------------------------------------------------------------


def _megatron_sink(source: "TensorSource", layout: ParallelLayout, args: argparse.Namespace) -> "TensorSink":
    from megatron_mixtral.weights.formats.dist_sink import DistSink
    from megatron_mixtral.weights.formats.dist_source import DistSource
    from megatron_mixtral.weights.formats.rank_sink import RankDirSink
    from megatron_mixtral.weights.formats.run_state import run_state

    common = {"vocab_divisible_by": args.make_vocab_size_divisible_by or 1, "replace": args.overwrite}
    if args.target_ckpt_format == "torch":
        return RankDirSink(args.save_dir, source.config, layout, **common)
    run = run_state(source) if isinstance(source, DistSource) and not args.no_load_optim else None
    if run is not None:
        rows = padded_vocabulary(source.config, layout, common["vocab_divisible_by"])
        asked = args.make_vocab_size_divisible_by is not None and rows != run.vocab_rows
        if asked or args.params_dtype is not None:
            flag = "--params-dtype" if args.params_dtype is not None else "--make-vocab-size-divisible-by"
            raise ConfigError(f"{flag} changes weights that the optimizer's state of {source.where} belongs to (it has "
                              f"{run.vocab_rows} vocabulary rows); leave the flag out, or give --no-load-optim to "
                              "convert the weights alone")
    return DistSink(args.save_dir, source.config, layout, run=run, **common)


def _export(source: "TensorSource", target: Path, template: Path | None, args: argparse.Namespace,
            tokenizer: list[Path], *, replace: bool) -> str:
    from megatron_mixtral.weights.convert import convert
    from megatron_mixtral.weights.formats.hf_sink import HFSink
    from megatron_mixtral.weights.formats.hf_source import companions_of
    from megatron_mixtral.weights.preview import preview

    sink = HFSink(target, source.config, template=template, max_shard_size=args.max_shard_size, replace=replace)
    companions = tokenizer + ([] if template is None else companions_of(template))
    if args.dry_run:
        return preview(source, sink, dtype=args.params_dtype, jobs=args.jobs, companions=companions)
    return str(convert(source, sink, companions=companions, **_options(args)))


def _known_config(args: argparse.Namespace) -> MixtralConfig | None:
    """The architecture, where a JSON file says it."""
    if args.loader == "mixtral_hf":
        return MixtralConfig.from_hf_dir(args.load_dir)
    # An iteration's own directory may be given; the configuration is then beside it.
    directory = args.load_dir if (args.load_dir / TRACKER).exists() else args.load_dir.parent
    return MixtralConfig.from_checkpoint(directory) if (directory / CONFIG_FILE).exists() else None


def _layout(args: argparse.Namespace, source: ParallelLayout | None) -> ParallelLayout:
    """The target layout; sizes that are not given are the source's, or 1 where there is none (yet)."""
    sizes = {axis: getattr(args, axis) if getattr(args, axis) is not None else getattr(source, axis, 1)
             for axis in ("tp", "pp", "ep")}
    if args.make_vocab_size_divisible_by is not None and args.make_vocab_size_divisible_by < 1:
        raise ConfigError(f"--make-vocab-size-divisible-by must be positive, found {args.make_vocab_size_divisible_by}")
    if source is None and args.loader == "mixtral_mg":  # not known yet: check only what is given
        return ParallelLayout(**sizes, etp=args.etp)
    return ParallelLayout(**sizes, etp=args.etp, vpp=args.vpp, first=args.first, last=args.last)


def _describe(config: MixtralConfig, layout: ParallelLayout, args: argparse.Namespace) -> str:
    padded = padded_vocabulary(config, layout, args.make_vocab_size_divisible_by or 1)
    plans = all_plans(config, layout, padded)
    check_complete(plans, config)
    return (f"{config.total_parameters:,} parameters, layout {layout}, vocabulary {config.vocab_size} "
            f"padded to {padded}\n" + describe(plans, BYTES.get(args.params_dtype, 2)))


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
        raise ConfigError(f"--tokenizer-model {path} does not exist")
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
