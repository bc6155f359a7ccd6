"""Plans as text: what a run needs, the ranking of layouts, and the flags of one. For the log and the terminal."""

import math
from collections.abc import Sequence
from dataclasses import fields

from megatron_mixtral.disk import human_size
from megatron_mixtral.planning.communication import Volume, communication_volume
from megatron_mixtral.planning.memory import Memory, fullest_stage, stage_memory
from megatron_mixtral.planning.search import Candidate
from megatron_mixtral.planning.shape import RunShape
from megatron_mixtral.planning.step_time import Machine, model_flops_rate

UNPACKING_AT_MOST = 0.2  # of a micro-batch's time


def describe(shape: RunShape) -> list[str]:
    """What the run needs: one line a kind, for the stage that needs most."""
    stage = fullest_stage(shape)
    layout, parameters, memory = shape.layout, shape.parameters_of_stage(stage), stage_memory(shape, stage)
    volume = communication_volume(shape, stage)
    kinds, sent = _by_kind(memory), _by_kind(volume)
    return [
        f"batch: {shape.global_batch_size} x {shape.seq_length} tokens = {shape.micro_batches} micro-batch(es) of "
        f"{shape.micro_batch_size} on {layout.data_parallel} replica(s)",
        f"parameters per device: {parameters.dense / 1e6:.2f} M dense + {parameters.expert / 1e6:.2f} M in experts"
        + (f" (stage {stage} of {layout.pp}, which needs most)" if layout.pp > 1 else "")
        + (f"; trained are adapters of {shape.trained_of_stage(stage).total / 1e6:.2f} M" if shape.adapter else ""),
        f"memory per device: {human_size(memory.total)} = {kinds}"
        + (f"; activations of {shape.chunks_in_flight(stage)} model chunk(s) in flight" if layout.pp > 1 else "")
        + (f"; recompute {shape.recompute}" if shape.recompute != "none" else ""),
        f"training state per device: {_state(shape, stage)}",
        f"sent per device and step: {human_size(volume.total)}" + (f" = {sent}" if sent else ""),
        f"pipeline bubble: {100 * shape.bubble:.1f} % of the time at work",
    ]


def _state(shape: RunShape, stage: int) -> str:
    """Where gradients and optimizer lie: whole on each replica, or cut over the replicas."""
    trained, bytes_each = shape.trained_of_stage(stage), 8 if shape.weight_bytes == 4 else 12
    shares = [f"{f'1/{ways}' if ways > 1 else 'all'} of {count / 1e6:.2f} M {what}" for what, count, ways in (
        ("dense", trained.dense, shape.dense_replicas), ("in experts", trained.expert, shape.expert_data_parallel))
        if count]
    held = ("Adam's moments" + (" and fp32 weights" if bytes_each == 12 else "")
            + f", {bytes_each} bytes a parameter, of ")
    if shape.distributed_optimizer:
        held += " and ".join(shares) + ", as in ZeRO-1"
    else:
        held += f"all {trained.total / 1e6:.2f} M, as on every replica (--use-distributed-optimizer cuts them)"
    return f"fp32 gradients of all {trained.total / 1e6:.2f} M, summed over the replicas; {held}"


def _by_kind(found: Memory | Volume) -> str:
    return ", ".join(f"{item.name.replace('_', ' ')} {human_size(getattr(found, item.name))}" for item in fields(found)
                     if getattr(found, item.name))


def ranking(candidates: Sequence[Candidate], top: int) -> list[str]:
    """A table of the fastest."""
    lines = [f"{'':>3} {'layout':<28} {'dp':>4} {'mbs':>4} {'recompute':<10} {'step s':>8} {'tokens/s/dev':>13} "
             f"{'TFLOP/s/dev':>12} {'bubble':>7} {'memory':>9}"]
    for place, one in enumerate(candidates[:top], start=1):
        shape, seconds = one.shape, one.step.total
        rate = shape.tokens / seconds / shape.layout.world
        lines.append(
            f"{place:>3} {str(shape.layout):<28} {shape.layout.data_parallel:>4} {shape.micro_batch_size:>4} "
            f"{shape.recompute:<10} {seconds:>8.2f} {rate:>13.0f} {model_flops_rate(shape, seconds) / 1e12:>12.0f} "
            f"{100 * shape.bubble:>6.1f}% {human_size(one.needs):>9}")
    return lines


def recompute_or_cut(candidates: Sequence[Candidate]) -> list[str]:
    """Two ways to the same memory: whether to compute activations again, or to cut sequences over devices, is faster.
    One sentence where both fit.
    """
    fastest = {cut: next((one for one in candidates if (one.shape.layout.cp > 1) is cut), None)
               for cut in (True, False)}
    if None in fastest.values():
        return []
    said = {cut: f"{one.shape.layout} with recompute {one.shape.recompute}, {one.step.total:.2f} s"
            for cut, one in fastest.items()}
    cheaper = "cutting" if fastest[True].step.total < fastest[False].step.total else "not cutting"
    return [f"Fastest with sequences cut over devices (cp): {said[True]}; without: {said[False]}. So {cheaper} them is "
            "faster."]


def explain(candidate: Candidate, machine: Machine) -> list[str]:
    """Where the predicted step goes, longest first, and what fills the memory."""
    total = candidate.step.total
    terms = sorted(((getattr(candidate.step, item.name), item.name, item.metadata["is"])
                    for item in fields(candidate.step)), reverse=True)
    lines = [f"{candidate.shape.layout}: a step of {total:.2f} s"]
    lines += [f"  {100 * seconds / total:5.1f} %  {seconds:8.3f} s  {name.replace('_', ' '):<14} {what}"
              for seconds, name, what in terms if seconds > 0]
    return [*lines, f"  memory {human_size(candidate.needs)} of {machine.device_memory:g} GB with reserve: "
                    + _by_kind(candidate.memory)]


def advice(candidate: Candidate, machine: Machine) -> list[str]:
    """Of a base in 4 bits, which is unpacked for each micro-batch: how many tokens one should have."""
    shape, micro_batches = candidate.shape, candidate.shape.micro_batches
    unpacking = candidate.step.unpacking / micro_batches
    if not unpacking:
        return []
    rest = (candidate.step.total - candidate.step.unpacking) / micro_batches / shape.tokens_per_micro_batch
    tokens = unpacking * (1 - UNPACKING_AT_MOST) / UNPACKING_AT_MOST / rest
    rounded = 2 ** math.ceil(math.log2(tokens))
    return [f"  weights of 4 bits are unpacked for {unpacking:.2f} s of each micro-batch of "
            f"{shape.tokens_per_micro_batch} tokens: from about {rounded} tokens on it is a fifth of the time or less"]


def flags(shape: RunShape) -> list[str]:
    """The flags of `tools/pretrain_mixtral.py` for this run."""
    layout = shape.layout
    words = [f"--tensor-model-parallel-size {layout.tp}", f"--pipeline-model-parallel-size {layout.pp}",
             f"--expert-model-parallel-size {layout.ep}"]
    if layout.etp != layout.tp:
        words.append(f"--expert-tensor-parallel-size {layout.etp}")
    if layout.cp > 1:
        words.append(f"--context-parallel-size {layout.cp}")
    if layout.vpp > 1:
        words.append(f"--num-virtual-stages-per-pipeline-rank {layout.vpp}")
    words += [f"--micro-batch-size {shape.micro_batch_size}", f"--global-batch-size {shape.global_batch_size}",
              f"--seq-length {shape.seq_length}", "--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce",
              "--overlap-param-gather"]
    if shape.adapter is not None:
        words += ["--hf-checkpoint DIR", f"--lora-rank {shape.adapter.rank}", *["--qlora"] * shape.adapter.quantized]
    if shape.recompute == "full":
        words.append("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    elif shape.recompute == "selective":
        words.append("--recompute-granularity selective --recompute-modules moe_act layernorm")
    return words
