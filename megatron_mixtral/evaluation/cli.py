"""The commands `evaluate` (MMLU from a folder, or tasks of lm-eval) and `perplexity` (of texts and data sets), of a
model in any layout, and `plot-evaluation`.
"""

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_mixtral import disk, model
from megatron_mixtral.command_line import Parser
from megatron_mixtral.data.datasets import blend_of, check_instruction, check_pretraining, instruction_blend, sizes_of
from megatron_mixtral.data.indexed import check_tokenizer
from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.evaluation.mmlu import METHODS, SHOTS, Mmlu, read_mmlu
from megatron_mixtral.evaluation.report import (
    assemble,
    check_new,
    depends_on,
    published,
    read_results,
    remarks,
    table,
)
from megatron_mixtral.inference import Generator, cli
from megatron_mixtral.runtime import launch
from megatron_mixtral.weights import open_source

logger = logging.getLogger(__name__)


def evaluate(argv: Sequence[str]) -> int:
    """Ask a model and print the table. Returns 0, or 1 on a rank that leaves it to another to say what is wrong."""
    args = _parser().parse_args(argv)
    tasks = [name for name in args.tasks.split(",") if name]
    shots = SHOTS if args.num_fewshot is None else args.num_fewshot
    if not tasks or (args.num_fewshot or 0) < 0 or (args.limit is not None and args.limit < 1):
        raise ConfigError(f"--tasks {args.tasks!r} --num-fewshot {args.num_fewshot} --limit {args.limit}: expected a "
                          "name at least, examples of at least 0, and a limit of at least 1")
    if find_spec("lm_eval") is None:
        raise ConfigError("evaluation needs lm-eval: pip install 'megatron-mixtral[eval]'")
    # All that can be wrong without the model is found before any rank is started.
    questions = None
    if "mmlu" in tasks and args.data_path is not None:
        questions = read_mmlu(args.data_path, shots)
        logger.info("%s: %d questions of %d subjects", questions.folder, questions.questions, len(questions.subjects))
    elif args.data_path is not None:
        raise ConfigError(f"--data-path {args.data_path} is of the task mmlu, and --tasks is {args.tasks}")
    if args.method != METHODS[0] and questions is None:
        raise ConfigError(f"--method {args.method} is of MMLU from a folder: give --data-path DIR, and mmlu in --tasks")
    reference = None if args.reference is None else read_results(args.reference)
    if args.include_path is not None and not args.include_path.is_dir():
        raise ConfigError(f"--include-path {args.include_path} is no folder: expected one of lm-eval's YAML files")
    if not args.resume:
        check_new(args.output)
    _check_place(args.output)
    named = [one for one in tasks if questions is None or one != "mmlu"]

    def work() -> None:
        if named and launch.is_first_here():
            from megatron_mixtral.evaluation.tasks import check_names

            check_names(named, args.include_path)
        generator = cli.open_generator(args, "evaluate", argv)
        with cli.leading(generator) as is_first:
            if is_first:
                local = {} if questions is None else questions.tasks(shots, args.method)
                _lead(generator, args, named, local, questions, reference)

    return launch.as_rank(work)


def _check_place(place: Path, flag: str = "--output") -> None:
    """`ConfigError` where nothing can be written: better now than when all is measured."""
    try:
        disk.try_writing(place)
    except OSError as error:
        raise ConfigError(f"{flag}: nothing can be written in {place} ({error.strerror}): give a place where it "
                          "can") from error


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description="Evaluate a Mixtral: MMLU and the tasks of lm-eval.", allow_abbrev=False)
    cli.model_flags(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--tasks", default="mmlu", metavar="NAME,...", help="tasks of lm-eval (mmlu)")
    group.add_argument("--data-path", type=Path, metavar="DIR",
                       help="folder of MMLU: the original, its test/, or the hub's; without it lm-eval asks the hub")
    group.add_argument("--method", choices=METHODS, default=METHODS[0],
                       help="how MMLU of a folder is asked: by the letters' log-probabilities, as lm-eval does, or by "
                            "the letter in one new token, as ModelLink does (%(default)s)")
    group.add_argument("--output", type=Path, required=True, metavar="DIR",
                       help="for results.json, table.md, and a file for each finished task")
    group.add_argument("--resume", action="store_true", help="go on: finished tasks in --output are kept")
    group.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question (MMLU: 5)")
    group.add_argument("--limit", type=int, metavar="N", help="only the first questions of each task")
    group.add_argument("--reference", type=Path, metavar="FILE",
                       help="results.json of lm-eval to stand beside (default: the published figure)")
    group.add_argument("--include-path", type=Path, metavar="DIR", help="further tasks of lm-eval, as its YAML files")
    group.add_argument("--log-samples", action="store_true", help="keep every question and answer")
    return parser


def _lead(generator: Generator, args: argparse.Namespace, names: Sequence[str],
          local: Mapping[str, dict[str, Any]], questions: Mmlu | None,
          reference: Mapping[str, Any] | None) -> None:
    # Only now and on rank 0 alone: lm-eval and datasets take seconds to import.
    from megatron_mixtral.evaluation.harness import Harness
    from megatron_mixtral.evaluation.tasks import evaluate as run

    harness, source = Harness(generator), open_source(args.load)
    depends = depends_on(
        source.config, Path(source.where), generator.tokenizer, layout=str(cli.layout_of(args)), limit=args.limit,
        dtype=model.type_name(args.dtype, source), max_length=generator.engine.max_length, num_fewshot=args.num_fewshot,
        method=args.method, mmlu_sha256=None if questions is None else questions.digest(),
        lm_eval_version=version("lm_eval"), adapter=_adapter(args, source))
    asked = {} if questions is None else {name: len(splits["test"]) for name, splits in questions.subjects.items()}
    sizes = {f"mmlu_{name}": min(size, args.limit or size) for name, size in asked.items()}
    parts = run(harness, {**local, **{name: name for name in names}}, args.output, depends, sizes=sizes,
                limit=args.limit, shots=args.num_fewshot, include=args.include_path, samples=args.log_samples,
                resume=args.resume)
    whole = assemble(parts, depends, questions is not None)
    if reference is None:
        reference = published(source.config, "acc,none" if args.method == METHODS[0] else "exact_match,letter")
    text = table(whole, reference)
    said = remarks(whole, questions is not None, source.config.model_type)
    text += "".join(f"\n{remark}\n" for remark in said)
    tokens = whole["tokens"]
    text += (f"\nTokens: {tokens['read']} read for {tokens['requests']} requests of {tokens['requested']}; "
             f"{tokens['distinct']} without last tokens asked again, {tokens['kept']} found in the cache.\n")
    text += "\n" + "".join(f"- {key}: {value}\n" for key, value in whole["config"].items())
    lines = json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=False)
    disk.write_whole(args.output / "results.json", lines + "\n")
    disk.write_whole(args.output / "table.md", text)
    print(text, end="", flush=True)


def perplexity(argv: Sequence[str]) -> int:
    """Score texts or data sets and print loss and perplexity. Returns 0, or 1 on a rank that leaves it to another to
    say what is wrong.
    """
    parser = _perplexity_parser()
    args = parser.parse_args(argv)
    from megatron_mixtral.evaluation.perplexity import check_inputs, validation_samples  # not needed to read the flags

    config = open_source(args.load).config
    _check_flags(args, config.max_position_embeddings)
    if args.data_path:
        _check_data(args, config.vocab_size)
    check_inputs(args.input)
    if args.output is not None:
        _check_place(args.output.parent)

    def work() -> None:
        generator = cli.open_generator(args, "perplexity", argv)
        cut = None
        if args.seq_length is not None:
            cut = validation_samples(args.data_path, instruction=args.is_instruction_dataset,
                                     seq_length=args.seq_length, split=args.split or "969,30,1",
                                     seed=1234 if args.seed is None else args.seed, count=args.samples,
                                     cache=args.data_cache_path, vocab_size=config.vocab_size)
        with cli.leading(generator) as is_first:
            if is_first:
                _score(generator, args, cut)

    return launch.as_rank(work)


def _check_flags(args: argparse.Namespace, longest: int) -> None:
    """`ConfigError` for flags that do not go together; `longest` is the model's longest context. Says how long windows
    are where the flags leave it open.
    """
    if bool(args.data_path) == bool(args.input):
        raise ConfigError("expected data sets (--data-path PREFIX ...) or texts (--input FILE ...), one of the two")
    if args.seq_length is None and (given := [flag for flag in ("samples", "split", "seed", "data_cache_path")
                                              if getattr(args, flag) is not None]):
        raise ConfigError(f"--{given[0].replace('_', '-')} is of samples as a run reads them: give its --seq-length")
    if args.seq_length is not None and args.input:
        raise ConfigError("--seq-length cuts data sets into a run's samples (--data-path); texts are read in windows "
                          "of --max-length")
    if args.is_instruction_dataset and args.input:
        raise ConfigError("--is-instruction-dataset is of data sets (--data-path); of texts every token counts")
    for flag in ("stride", "samples", "seq_length"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} {value}: expected at least 1")
    if args.seq_length is not None and args.samples is None and len(args.data_path) > 1:
        raise ConfigError("an epoch is of one data set: of a blend, say how many --samples")
    if args.seq_length is not None and not sizes_of(args.split)[1]:
        raise ConfigError(f"--split {args.split} leaves nothing to validate on: give its second part a size, as in "
                          "969,30,1")
    if args.max_length is None:
        args.max_length = args.seq_length or min(longest, Generator.LONGEST)
    if args.stride is not None and args.stride > args.max_length:
        raise ConfigError(f"--stride {args.stride} is more than a window reads, {args.max_length} tokens "
                          "(--max-length): some would not be scored")
    if args.output is not None and args.output.is_dir():
        raise ConfigError(f"--output {args.output} is a folder: expected the name of a file")


def _check_data(args: argparse.Namespace, vocab_size: int) -> None:
    """`DataError` for data sets that are not whole, of another vocabulary, or of another kind than the flags say;
    `ConfigError` where the index of a run's samples cannot be written.
    """
    if args.is_instruction_dataset:
        # Without a run's rows a sample may be of any length: it is read in windows.
        check_instruction([instruction_blend(args.data_path)], vocab_size, args.seq_length or sys.maxsize, 1)
        return
    blend = blend_of(args.data_path)
    for prefix in blend[0]:
        for column in ("input_ids", "attention_mask", "labels"):
            if (whole := prefix.removesuffix(f"_packed_{column}_document")) != prefix:
                raise DataError(f"--data-path {prefix} is one of the three parts of an instruction set: give "
                                f"--data-path {whole} --is-instruction-dataset")
    check_pretraining([blend], vocab_size, args.seq_length or 1)
    cache = Path(args.data_cache_path or f"{blend[0][0]}_index_cache")
    if args.seq_length is not None and not (cache.is_dir() and any(cache.iterdir())):
        _check_place(cache, "--data-cache-path")


def _perplexity_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Loss and perplexity of texts or data sets.", allow_abbrev=False)
    cli.model_flags(parser)
    group = parser.add_argument_group("perplexity")
    group.add_argument("--data-path", nargs="+", default=(), metavar="PREFIX",
                       help="data sets of preprocessing: each document by itself, or with --seq-length a run's samples")
    group.add_argument("--is-instruction-dataset", action="store_true",
                       help="the data sets are dialogues: each sample by itself, of which the trained tokens count")
    group.add_argument("--input", nargs="+", default=(), metavar="FILE",
                       help="texts: each .txt as one; JSON lines and Parquet as preprocessing reads them")
    group.add_argument("--json-key", default="text", metavar="KEY", help="of the texts in --input (text)")
    group.add_argument("--stride", type=int, metavar="N",
                       help="tokens between the beginnings of two windows of a text (default: --max-length)")
    group.add_argument("--output", type=Path, metavar="FILE", help="for all figures, as JSON")
    group = parser.add_argument_group("as a run validates")
    group.add_argument("--seq-length", type=int, metavar="N", help="the run's: score the samples that it validates on")
    group.add_argument("--split", metavar="A,B,C", help="the run's: the second part is validated on (969,30,1)")
    group.add_argument("--seed", type=int, metavar="N", help="the run's (1234)")
    group.add_argument("--samples", type=int, metavar="N",
                       help="--eval-iters x --global-batch-size: the first evaluation's (default: of one epoch)")
    group.add_argument("--data-cache-path", metavar="DIR", help="the run's: for the index of the samples")
    return parser


def _score(generator: Generator, args: argparse.Namespace, cut: Any) -> None:
    from megatron_mixtral.evaluation.perplexity import Figures, documents, instructions, measure, texts
    from megatron_mixtral.evaluation.perplexity import table as lines_of

    tokenizer, length = generator.tokenizer, generator.engine.max_length
    if tokenizer is None and args.input:
        generator.encode("")  # says what is missing
    stride = args.stride or length
    instruction = args.is_instruction_dataset
    prefixes, _ = (instruction_blend if instruction else blend_of)(args.data_path) or ([], None)
    for prefix in prefixes if tokenizer is not None else ():
        check_tokenizer(f"{prefix}_packed_input_ids_document" if instruction else prefix, tokenizer)
    if cut is not None:
        passages = {" ".join(args.data_path): cut}
    elif args.data_path:
        passages = {prefix: instructions(prefix) if instruction else documents(prefix, tokenizer)
                    for prefix in prefixes}
    else:
        passages = {one: texts(one, args.json_key, tokenizer) for one in args.input}
    found, total = {}, Figures()
    for name, some in passages.items():
        figures = measure(generator, some, stride)
        found[name] = figures.report(name)
        total.add(figures)
    if len(found) > 1:
        found["all"] = total.report("all")
    source = open_source(args.load)
    if args.output is not None:
        depends = depends_on(
            source.config, Path(source.where), tokenizer, layout=str(cli.layout_of(args)),
            dtype=model.type_name(args.dtype, source), max_length=length, stride=stride, instruction=instruction,
            seq_length=args.seq_length, split=args.split, seed=args.seed, samples=args.samples,
            adapter=_adapter(args, source))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        disk.write_whole(args.output, json.dumps({"results": found, "config": depends}, indent=2) + "\n")
    print(lines_of(found), end="", flush=True)


def _adapter(args: argparse.Namespace, source: Any) -> Path | None:
    """Where the adapters of the model lie, if it has any."""
    return args.adapter and Path(open_source(args.adapter, base=source.config).where)


def plot(argv: Sequence[str]) -> int:
    """Draw the accuracies of evaluations as dots and print where the picture is."""
    parser = Parser(description="Draw each task's or subject's accuracy, beside those of other models.")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS",
                        help="results.json of an evaluation, or its folder; the first one's subjects give the order")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="results.json to stand beside, as lm-eval's")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="of the models, the reference last")
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="default: evaluation.png beside the first one")
    args = parser.parse_args(argv)
    paths = [one / "results.json" if one.is_dir() else one for one in [*args.results, *filter(None, [args.reference])]]
    labels = args.labels or [one.absolute().parent.name for one in paths[:len(args.results)]] + (
        ["reference"] if args.reference else [])
    if len(labels) != len(paths):
        raise ConfigError(f"--labels has {len(labels)} names for {len(paths)} models: expected one for each")
    from megatron_mixtral.evaluation.plot import draw, figures_of

    output = args.output or paths[0].with_name("evaluation.png")
    _check_place(output.parent)
    found = [figures_of(read_results(path), str(path)) for path in paths]
    draw([*zip(labels, found, strict=True)], output)
    print(output)
    return 0
