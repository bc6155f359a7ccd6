"""The command `evaluate`: MMLU from a folder, or tasks of lm-eval, of a model in any layout."""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_mixtral import disk, model
from megatron_mixtral.command_line import Parser
from megatron_mixtral.config import read_json
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.evaluation.mmlu import SHOTS, Mmlu, read_mmlu
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
    reference = None if args.reference is None else read_json(args.reference)

    def work() -> None:
        generator = cli.open_generator(args, "evaluate", argv)
        with cli.leading(generator) as is_first:
            if is_first:
                local = {} if questions is None else questions.tasks(shots)
                _lead(generator, args, [one for one in tasks if not (local and one == "mmlu")], local, questions,
                      reference)

    return launch.as_rank(work)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description="Evaluate a Mixtral: MMLU and the tasks of lm-eval.", allow_abbrev=False)
    cli.model_flags(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--tasks", default="mmlu", metavar="NAME,...", help="tasks of lm-eval (mmlu)")
    group.add_argument("--data-path", type=Path, metavar="DIR",
                       help="folder of MMLU: the original, its test/, or the hub's; without it lm-eval asks the hub")
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
    from megatron_mixtral.evaluation.report import assemble, depends_on, published, remarks, table
    from megatron_mixtral.evaluation.tasks import evaluate as run

    harness, source = Harness(generator), open_source(args.load)
    depends = depends_on(
        source.config, Path(source.where), generator.tokenizer, layout=str(cli.layout_of(args)), limit=args.limit,
        dtype=model.type_name(args.dtype, source), max_length=generator.engine.max_length, num_fewshot=args.num_fewshot,
        mmlu_sha256=None if questions is None else questions.digest(),
        adapter=args.adapter and Path(open_source(args.adapter, base=source.config).where))
    asked = {} if questions is None else {name: len(splits["test"]) for name, splits in questions.subjects.items()}
    sizes = {f"mmlu_{name}": min(size, args.limit or size) for name, size in asked.items()}
    parts = run(harness, {**local, **{name: name for name in names}}, args.output, depends, sizes=sizes,
                limit=args.limit, shots=args.num_fewshot, include=args.include_path, samples=args.log_samples,
                resume=args.resume)
    whole = assemble(parts, depends, questions is not None)
    text = table(whole, published(source.config) if reference is None else reference)
    text += "".join(f"\n{remark}\n" for remark in remarks(whole, questions is not None))
    tokens = whole["tokens"]
    text += (f"\nTokens: {tokens['read']} read for {tokens['requests']} requests of {tokens['requested']}; "
             f"{tokens['distinct']} without last tokens asked again, {tokens['kept']} found in the cache.\n")
    text += "\n" + "".join(f"- {key}: {value}\n" for key, value in whole["config"].items())
    lines = json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=False)
    disk.write_whole(args.output / "results.json", lines + "\n")
    disk.write_whole(args.output / "table.md", text)
    print(text, end="", flush=True)
