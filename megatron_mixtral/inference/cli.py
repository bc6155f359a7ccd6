"""The command `generate`, and the flags that all programs of this room and above it share.

    parser = Parser(...)
    model_flags(parser)
    sampling_flags(parser)
    args = parser.parse_args(argv)
    generator = open_generator(args, "generate", argv)   # starts the ranks first, where this process is none
    with leading(generator) as is_first:                 # the other ranks follow in there, until rank 0 leaves
        if is_first: ...

Chat and server take their model by the same flags.
"""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_mixtral import disk
from megatron_mixtral.command_line import Parser, hush_libraries
from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.errors import ConfigError, DataError
from megatron_mixtral.inference.generator import Completion, Generator, Prompt
from megatron_mixtral.inference.parameters import SamplingParams
from megatron_mixtral.runtime import launch
from megatron_mixtral.tokenizer import chat_prompts

_LAYOUT = ("tp", "pp", "ep", "etp", "first", "last")
_DTYPES = {"--bf16": "bfloat16", "--fp16": "float16", "--fp32": "float32"}


def model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model, in which layout and with how large a cache."""
    group = parser.add_argument_group("model")
    group.add_argument("--load", type=Path, required=True, metavar="DIR",
                       help="Hugging Face folder, rank directories of any layout, or a run's save directory")
    group.add_argument("--adapter", type=Path, metavar="DIR",
                       help="adapters of this model: a PEFT folder, or a checkpoint of a run with --lora-rank")
    group.add_argument("--tokenizer-model", type=Path, metavar="PATH",
                       help="directory or file of the tokenizer (default: the one in --load)")
    for axis in _LAYOUT:
        group.add_argument(ParallelLayout.training_flags[axis], type=int, dest=axis, metavar="N",
                           help="any: it need not be the checkpoint's")
    for flag, dtype in _DTYPES.items():
        group.add_argument(flag, dest="dtype", action="store_const", const=dtype, help=f"compute in {dtype} "
                           "(default: as stored)")
    group.add_argument("--max-slots", type=int, default=8, metavar="N", help="continuations at a time (8)")
    group.add_argument("--max-length", type=int, metavar="N",
                       help="longest context, prompt included (default: the model's, at most 4096)")
    group.add_argument("--prompt-chunk", type=int, default=512, metavar="N", help="tokens of prompts in one step (512)")
    group.add_argument("--nproc", type=int, metavar="N",
                       help="started plainly: ranks to start on this machine (default: as many as the layout needs)")


def sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `SamplingParams`, under the names of its fields."""
    group, default = parser.add_argument_group("sampling"), SamplingParams()
    for flag, kind, said in (
            ("--max-tokens", int, "new tokens at most"), ("--temperature", float, "0: the most probable token always"),
            ("--top-k", int, "only the k most probable tokens; 0: all"),
            ("--top-p", float, "the fewest tokens that hold this probability together"),
            ("--repetition-penalty", float, "above 1: against what was there before"),
            ("--seed", int, "the same text for the same seed"),
            ("--logprobs", int, "log-probabilities of the new tokens, and of so many others")):
        value = getattr(default, flag.removeprefix("--").replace("-", "_"))
        group.add_argument(flag, type=kind, default=value, help=f"{said} ({'none' if value is None else value})")
    # Not --n, which torchrun would take for the beginning of a flag of its own.
    group.add_argument("--num-samples", type=int, default=default.n, dest="n", help="continuations of each prompt (1)")
    group.add_argument("--stop", nargs="+", default=(), metavar="TEXT", help="texts before which a continuation ends")
    group.add_argument("--stop-token-ids", nargs="+", type=int, default=(), metavar="ID",
                       help="besides the model's own")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's own stop ids")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """What `sampling_flags` were given. `ConfigError` for what cannot be."""
    return SamplingParams(**{item.name: getattr(args, item.name) for item in dataclasses.fields(SamplingParams)
                             if item.name != "adapter"})  # the flag of that name says which one there is


def template_flag(parser: argparse.ArgumentParser, said: str) -> None:
    """Add the flag that says how a chat's prompts are written."""
    parser.add_argument("--prompt-template", metavar="NAME", help=said)


def prompts_of(generator: Generator, template: str | None) -> Any:
    """How the generator's model is asked in a chat, see `tokenizer.chat_prompts`. `ConfigError` without a tokenizer."""
    generator.encode("")
    return chat_prompts(generator.prompt_tokenizer, generator.tokenizer.path.parent, template)


def with_ends(params: SamplingParams, prompts: Any) -> SamplingParams:
    """The settings, and what ends an answer to these prompts beside them."""
    return dataclasses.replace(params, stop=(*params.stop, *prompts.ends.texts),
                               stop_token_ids=(*params.stop_token_ids, *prompts.ends.ids))


def layout_of(args: argparse.Namespace) -> ParallelLayout:
    """The layout of `model_flags`."""
    return ParallelLayout(**{axis: getattr(args, axis) for axis in _LAYOUT if getattr(args, axis) is not None})


def open_generator(args: argparse.Namespace, command: str, argv: Sequence[str]) -> Generator:
    """The generator of `model_flags`. Where the layout needs more ranks than this process, it becomes torchrun, which
    starts `megatron-mixtral COMMAND ARGV` as so many ranks, and does not return. Errors as `Generator.from_pretrained`.
    """
    layout = layout_of(args)
    hush_libraries()
    launch.take_part(launch.decide_here(layout.min_world, args.nproc), command, argv)
    if not launch.is_first_here():
        logging.getLogger("megatron_mixtral").setLevel(logging.WARNING)  # rank 0 says it for all
    return Generator.from_pretrained(args.load, layout, args.dtype, adapter=args.adapter,
                                     tokenizer=args.tokenizer_model, max_slots=args.max_slots,
                                     max_length=args.max_length, prompt_chunk=args.prompt_chunk)


@contextmanager
def leading(generator: Generator) -> Iterator[bool]:
    """True on rank 0, which does what follows; False on the others, which have by then followed it to its end."""
    if not generator.engine.is_first:
        generator.engine.follow()
        yield False
        return
    try:
        yield True
    finally:
        generator.engine.close()


def generate(argv: Sequence[str]) -> int:
    """Continue prompts and print a JSON object for each continuation. Returns 0, or 1 on a rank that leaves it to
    another one to say what is wrong.
    """
    parser = Parser(
        description="Continue prompts with a Mixtral: a JSON object a line for each continuation.", allow_abbrev=False)
    model_flags(parser)
    sampling_flags(parser)
    parser.add_argument("--prompts", nargs="+", metavar="TEXT", help="the prompts themselves")
    parser.add_argument("--prompts-file", type=Path, metavar="FILE",
                        help="a prompt on each line; in FILE.jsonl a JSON text, or an object with a prompt (a text, or "
                             "token ids) and sampling settings of its own (default: standard input)")
    parser.add_argument("--jsonl", action="store_true", help="the lines are JSON, whatever their file is called")
    template_flag(parser, "write each text prompt as a question, by the model's own chat template (model) or one of "
                          "training's (mixtral, chatml, ...); default: as it stands")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the answers go (default: standard output)")
    args = parser.parse_args(argv)
    common = sampling_params(args)
    requests = None
    if args.prompts or args.prompts_file:
        requests = _requests(args, common)  # before any rank is started

    def work() -> None:
        generator = open_generator(args, "generate", argv)
        with leading(generator) as is_first:
            if is_first:
                prompts, params = asked = requests or _requests(args, common)
                if args.prompt_template:
                    asked = _as_questions(generator, args.prompt_template, prompts, params)
                _write((_answer(prompts[place], one) for place, one in generator.completions(*asked)), args.output)

    return launch.as_rank(work)


def _as_questions(generator: Generator, template: str, prompts: Sequence[Prompt],
                  params: Sequence[SamplingParams]) -> tuple[list[Prompt], list[SamplingParams]]:
    """The texts among the prompts as a chat's first question, and with what ends its answer."""
    written = prompts_of(generator, template)
    return ([written.prompt([{"role": "user", "content": one}]) if isinstance(one, str) else one for one in prompts],
            [with_ends(one, written) for one in params])


def _requests(args: argparse.Namespace, common: SamplingParams) -> tuple[list[Prompt], list[SamplingParams]]:
    if args.prompts:
        return list(args.prompts), [common] * len(args.prompts)
    return read_prompts(args.prompts_file, common, args.jsonl)


def read_prompts(path: Path | None, common: SamplingParams,
                 as_json: bool = False) -> tuple[list[Prompt], list[SamplingParams]]:
    """The prompts of a file (None: of standard input), a line each, and their settings: `common`, unless a line of
    JSON, which those of FILE.jsonl are, says otherwise. `DataError` for a file or lines that cannot be read.
    """
    where, lines = "standard input", sys.stdin
    if path is not None:
        where, as_json = str(path), as_json or path.suffix == ".jsonl"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"the prompts of {where} cannot be read: {error}") from error
    found = [_request(line.rstrip("\n"), as_json, f"{where}, line {number}", common)
             for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"{where} holds no prompt: expected one on each line")
    prompts, params = zip(*found, strict=True)
    return list(prompts), list(params)


def _request(line: str, as_json: bool, where: str, common: SamplingParams) -> tuple[Prompt, SamplingParams]:
    if not as_json:
        return line, common
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    own = dict(value) if isinstance(value, dict) else {"prompt": value}
    prompt = own.pop("prompt", None)
    is_ids = isinstance(prompt, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in prompt)
    if not isinstance(prompt, str) and not is_ids:
        raise DataError(f"{where}: expected a text, or an object with a prompt, a text or a list of token ids")
    known = [item.name for item in dataclasses.fields(SamplingParams)]
    if unknown := [name for name in own if name not in known]:
        raise DataError(f"{where}: {', '.join(unknown)}: beside the prompt there may be {', '.join(known)}")
    try:
        return prompt, dataclasses.replace(common, **own)
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from error


def _answer(prompt: Prompt, one: Completion) -> dict[str, Any]:
    answer = {"prompt": prompt, "index": one.index, "text": one.text, "token_ids": one.token_ids,
              "finish_reason": one.finish_reason, "stop_reason": one.stop_reason, "message": one.message,
              "logprobs": [dataclasses.asdict(logprobs) for logprobs in one.logprobs]}
    always = ("prompt", "text", "token_ids", "finish_reason")
    return {name: value for name, value in answer.items() if value or name in always}


def _write(answers: Iterable[dict[str, Any]], output: Path | None) -> None:
    """To standard output as they come; a file is whole or not there."""
    lines = (json.dumps(answer, ensure_ascii=False) for answer in answers)
    if output is not None:
        disk.write_whole(output, "".join(line + "\n" for line in lines))
        return
    for line in lines:
        print(line, flush=True)
