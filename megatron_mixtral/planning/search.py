"""The layouts that a machine allows for a model and a batch, those that fit in memory, and the fastest of them."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_mixtral.config import AdapterConfig, MixtralConfig, ParallelLayout
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.planning.memory import Memory, fullest_stage, stage_memory
from megatron_mixtral.planning.shape import RECOMPUTE, RunShape
from megatron_mixtral.planning.step_time import Machine, StepTime, predicted_step

MEMORY_SHARE = 0.92  # of a device's memory that a run may plan with: fragmentation
CONTEXT_SIZES = (1, 2, 4, 8, 16)
RESERVED = 4e9  # bytes of a device for its context and communication buffers
MOST_DEVICES = 4096  # that are tried to find enough


@dataclass(frozen=True)
class Candidate:
    """A run that is possible, its memory at the fullest stage and its predicted step."""

    shape: RunShape
    memory: Memory
    step: StepTime

    @property
    def needs(self) -> float:
        """Bytes a device must have."""
        return (self.memory.total + RESERVED) / MEMORY_SHARE


@dataclass(frozen=True)
class Question:
    """What the planner is asked."""

    config: MixtralConfig
    machine: Machine
    seq_length: int
    global_batch_size: int
    micro_batch_sizes: tuple[int, ...] = (1, 2, 4)
    adapter: AdapterConfig | None = None


def plan(question: Question) -> tuple[list[Candidate], list[Candidate]]:
    """(Those that fit, fastest first; those that do not, smallest first).

    Of runs that differ in virtual stages or recomputation alone, only the fastest that fits is kept: the others are
    steps on the way to it, not alternatives.
    """
    fits: dict[tuple, Candidate] = {}
    too_large: dict[tuple, Candidate] = {}
    for shape in shapes(question):
        candidate = Candidate(shape, stage_memory(shape, fullest_stage(shape)), predicted_step(shape, question.machine))
        layout = shape.layout
        key = (layout.tp, layout.pp, layout.ep, layout.etp, layout.cp, shape.micro_batch_size)
        if candidate.needs <= question.machine.device_memory * 1e9:
            if key not in fits or candidate.step.total < fits[key].step.total:
                fits[key] = candidate
        elif key not in too_large or candidate.needs < too_large[key].needs:
            too_large[key] = candidate
    rest = [candidate for key, candidate in too_large.items() if key not in fits]
    return sorted(fits.values(), key=lambda one: one.step.total), sorted(rest, key=lambda one: one.needs)


def any_fits(question: Question) -> bool:
    """Whether some layout fits, however slow: the smallest micro-batch, no virtual stages, which hold more."""
    smallest = replace(question, micro_batch_sizes=(min(question.micro_batch_sizes),))
    return any(stage_memory(shape, fullest_stage(shape)).total <= room(question.machine)
               for shape in shapes(smallest) if shape.layout.vpp == 1)


def enough_devices(question: Question) -> int | None:
    """The first on which a layout fits of 2, 4, 8 ... times as many devices; None up to `MOST_DEVICES`."""
    machine, adapter = question.machine, question.adapter
    each = 18.0 if adapter is None else 0.5 if adapter.quantized else 2.0  # bytes of a parameter, at least
    count = 2 * machine.devices
    while count <= MOST_DEVICES:
        enough = question.config.total_parameters * each < count * room(machine)
        if enough and any_fits(with_devices(question, count)):
            return count
        count *= 2
    return None


def with_devices(question: Question, count: int) -> Question:
    """The same of another number of devices."""
    return replace(question, machine=replace(question.machine, devices=count))


def room(machine: Machine) -> float:
    """Bytes of a device that a run may plan with."""
    return machine.device_memory * 1e9 * MEMORY_SHARE - RESERVED


def least_batch(question: Question) -> int:
    """The smallest global batch that some layout divides; it divides every multiple of it too."""
    size, found = min(question.micro_batch_sizes), []
    for layout in layouts(question.config, question.machine):
        with contextlib.suppress(ConfigError):  # sequences that it does not cut evenly
            found.append(RunShape(question.config, layout, question.seq_length, size, size * layout.data_parallel,
                                  adapter=question.adapter).global_batch_size)
    return min(found)


def shapes(question: Question) -> Iterator[RunShape]:
    """Every run that layout and batch arithmetic allow, with tensor parallelism inside a node."""
    for layout in layouts(question.config, question.machine):
        for micro_batch in question.micro_batch_sizes:
            for recompute in RECOMPUTE:
                try:
                    yield RunShape(question.config, layout, question.seq_length, micro_batch,
                                   question.global_batch_size, recompute, adapter=question.adapter)
                except ConfigError:
                    break  # the batch does not divide, nor the blocks of 4 bits


def layouts(config: MixtralConfig, machine: Machine) -> Iterator[ParallelLayout]:
    """Every layout of the model on the machine."""
    for pp in divisors(config.num_hidden_layers):
        for vpp in divisors(config.num_hidden_layers // pp) if pp > 1 else (1,):
            for tp in divisors(config.num_key_value_heads):
                for ep in divisors(config.num_local_experts):
                    for etp in {1, tp} if ep > 1 else {tp}:
                        for cp in CONTEXT_SIZES:
                            layout = ParallelLayout(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, cp=cp, world=machine.devices)
                            if machine.devices % layout.min_world or not machine.in_nodes(tp):
                                continue
                            if config.intermediate_size % layout.etp == 0:
                                yield layout.validate(config)


def divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]
