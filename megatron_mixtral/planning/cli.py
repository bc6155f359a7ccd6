"""The planner on the command line: which layouts of a Mixtral fit a machine, fastest first."""

import argparse
import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace

from megatron_mixtral.command_line import Parser
from megatron_mixtral.config import AdapterConfig, MixtralConfig, ParallelLayout, hardware, preset
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.planning import least, report, search
from megatron_mixtral.planning.search import Candidate, Question
from megatron_mixtral.planning.step_time import Machine, model_flops_rate


def parser() -> Parser:
    found = Parser(description="Rank the parallel layouts of a Mixtral that fit a machine.")
    model = found.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="preset: tiny, mixtral-4x7b, mixtral-8x7b, mixtral-8x22b")
    model.add_argument("--hf-checkpoint", help="Hugging Face Mixtral directory; its config.json is read")
    found.add_argument("--device", default="h100-sxm", metavar="NAME",
                       help=f"whose data sheet's figures are taken where none are given: {', '.join(hardware.DEVICES)}")
    for item in fields(Machine):
        found.add_argument("--" + item.name.replace("_", "-"), type=item.type, required=item.name == "devices",
                           help=item.metadata["help"])
    found.add_argument("--seq-length", type=int, default=4096)
    found.add_argument("--global-batch-size", type=int, required=True)
    found.add_argument("--micro-batch-size", type=int, nargs="+",
                       help="sizes to try (1 2 4; of adapters 1 2 4 8 16)")
    found.add_argument("--lora-rank", type=int, help="plan a run that trains adapters of this rank on every linear")
    found.add_argument("--qlora", action="store_true", help="with --lora-rank: beside a base of 4 bits")
    found.add_argument("--top", type=int, default=10, help="how many layouts to print")
    found.add_argument("--json", action="store_true", help="print the ranking as JSON instead")
    found.add_argument("--least-hardware", action=_LeastHardware, nargs="*", type=float, metavar="GB",
                       help="print how many devices of these sizes (default: 24 48 80 141) each published model needs "
                            "at least to be pretrained, tuned and generated from, as a table in Markdown, and end")
    return found


class _LeastHardware(argparse.Action):
    """Needs no other flag, as --help does not."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: object, values: list[float], *_: object) -> None:
        print("\n".join(least.least_hardware(tuple(values) or (24, 48, 80, 141))))
        parser.exit()


def plan(argv: Sequence[str]) -> int:
    """Print the ranking. Raises `ConfigError` where nothing fits."""
    for line in lines(argv):
        print(line)
    return 0


def lines(argv: Sequence[str]) -> Iterator[str]:
    """What the command prints. Raises `ConfigError` where nothing fits, with the smallest that does not."""
    args = parser().parse_args(argv)
    config = preset(args.model) if args.model else MixtralConfig.from_hf_dir(args.hf_checkpoint)
    given = {item.name: getattr(args, item.name) for item in fields(Machine)}
    machine = Machine.of(hardware.named(args.device), **{name: one for name, one in given.items() if one is not None})
    if args.qlora and args.lora_rank is None:
        raise ConfigError("--qlora is of a run that trains adapters: give --lora-rank, or drop it")
    adapter = None if args.lora_rank is None else _adapter(config, args.lora_rank, args.qlora)
    sizes = args.micro_batch_size or (1, 2, 4, *([8, 16] if adapter else []))
    _check(args, sizes, config, machine)
    question = Question(config, machine, args.seq_length, args.global_batch_size, tuple(sizes), adapter)
    fitting, too_large = search.plan(question)
    if not fitting:
        raise ConfigError(_nothing_fits(too_large, question))
    if args.json:
        yield json.dumps([_as_json(one) for one in fitting[:args.top]], indent=2)
        return
    yield f"{len(fitting)} layouts fit {machine.devices} devices of {machine.device_memory:g} GB:"
    yield from report.ranking(fitting, args.top)
    yield ""
    yield from report.recompute_or_cut(fitting)
    yield from report.explain(fitting[0], machine)
    yield from report.advice(fitting[0], machine)
    yield ""
    yield "Flags of the first:"
    yield "  " + " \\\n  ".join(report.flags(fitting[0].shape))


def _adapter(config: MixtralConfig, rank: int, quantized: bool) -> AdapterConfig:
    adapter = AdapterConfig.of(config, rank=rank, quantized=quantized)
    adapter.check_blocks(ParallelLayout(world=1))
    return adapter


def _check(args: argparse.Namespace, sizes: Sequence[int], config: MixtralConfig, machine: Machine) -> None:
    figures = {item.name: getattr(machine, item.name) for item in fields(Machine)}
    figures |= {"seq_length": args.seq_length, "global_batch_size": args.global_batch_size, "top": args.top,
                "micro_batch_size": min(sizes)}
    for name, value in figures.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} must be positive, found {value}")
    if args.seq_length > config.max_position_embeddings:
        raise ConfigError(f"--seq-length {args.seq_length} is longer than the model's max_position_embeddings "
                          f"{config.max_position_embeddings}")


def _nothing_fits(too_large: list[Candidate], question: Question) -> str:
    machine, batch = question.machine, question.global_batch_size
    if not too_large:
        step = search.least_batch(question)
        near = [one for one in (batch - batch % step, batch - batch % step + step) if one]
        return (f"no layout divides {machine.devices} devices, --global-batch-size {batch} and --micro-batch-size "
                f"{' '.join(map(str, question.micro_batch_sizes))}: a global batch is a multiple of micro-batch size x "
                f"data parallel, here of {step} at least; give {' or '.join(map(str, near))}, or change --devices")
    smallest = too_large[0]
    return (f"nothing fits {machine.devices} devices of {machine.device_memory:g} GB: the smallest, "
            f"{smallest.shape.layout} with micro-batch {smallest.shape.micro_batch_size} and recompute "
            f"{smallest.shape.recompute}, needs {smallest.needs / 1e9:.0f} GB a device; {_what_would(question)}")


def _what_would(question: Question) -> str:
    """A power of two of these devices, which more layouts divide; more devices; less that is trained, where the whole
    model was to be trained, or a base that is not packed.
    """
    part = 2 ** (question.machine.devices.bit_length() - 1)
    if part < question.machine.devices and search.any_fits(search.with_devices(question, part)):
        return f"{part} of them are enough: {question.machine.devices} allow few layouts"
    count = search.enough_devices(question)
    said = f"{count} such devices are enough" if count else f"{search.MOST_DEVICES} such devices are not enough either"
    rank = question.adapter.rank if question.adapter else least.RANK
    for quantized in (False, True):
        flags = f"--lora-rank {rank}" + " --qlora" * quantized
        tried = question.adapter is not None and question.adapter.quantized >= quantized
        with contextlib.suppress(ConfigError):  # blocks of 4 bits that the model's sizes do not allow
            if not tried and search.any_fits(replace(question, adapter=_adapter(question.config, rank, quantized))):
                return f"{said}, or adapters on these ({flags})"
    return said


def _as_json(one: Candidate) -> dict[str, object]:
    return {
        "layout": asdict(one.shape.layout), "micro_batch_size": one.shape.micro_batch_size,
        "recompute": one.shape.recompute, "step_seconds": one.step.total, "terms": asdict(one.step),
        "model_tflops_per_device": model_flops_rate(one.shape, one.step.total) / 1e12,
        "memory_bytes": asdict(one.memory), "needs_bytes": one.needs, "flags": report.flags(one.shape),
    }
