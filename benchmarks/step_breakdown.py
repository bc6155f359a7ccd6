"""Where the time and the memory of one step go, from torch.profiler, for every candidate alike.

Forward operations are counted where the module that calls them belongs; a backward operation where the forward
operation with its sequence number is. What belongs to no module (residual sums, gradient accumulation) is "rest".
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

# The end of a module's name -> part of the step; the innermost module counts. First ours, then transformers' names.
PARTS = {
    "self_attention": "attention", "self_attn": "attention",
    "mlp.experts": "experts", "mlp": "permute", "router": "permute",
    "input_layernorm": "norm", "pre_mlp_layernorm": "norm", "post_attention_layernorm": "norm",
    "final_layernorm": "norm", "model.norm": "norm",
    "output_layer": "logits", "lm_head": "logits",
}
LOSS = ("CrossEntropy", "cross_entropy", "log_softmax", "nll_loss", "ChunkedLoss")
MARK = "part: "


def _part_of(name: str) -> str | None:
    return next((part for end, part in PARTS.items() if name == end or name.endswith("." + end)), None)


def _marked(model: torch.nn.Module, stack: ExitStack) -> None:
    """Hooks that put a named range around the forward of every module of a known part, while `stack` is open."""
    for name, module in model.named_modules():
        part = _part_of(name)
        if part is None:
            continue
        ranges: list[Any] = []

        def enter(*args: Any, part: str = part, ranges: list[Any] = ranges, **kwargs: Any) -> None:
            ranges.append(record_function(MARK + part))
            ranges[-1].__enter__()

        def leave(*args: Any, ranges: list[Any] = ranges, **kwargs: Any) -> None:
            ranges.pop().__exit__(None, None, None)

        for hook in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave)):
            stack.callback(hook.remove)


def _own_part(event: Any) -> str | None:
    """The part of the innermost range around an operation."""
    while event is not None:
        if event.name.startswith(MARK):
            return event.name.removeprefix(MARK)
        if any(word in event.name for word in LOSS):
            return "logits"
        event = event.cpu_parent
    return None


def breakdown(candidate: Any, device: str) -> dict[str, float]:
    """Milliseconds of one step by part: of kernels on a GPU, of operations on a CPU."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with ExitStack() as stack:
        _marked(candidate.model, stack)
        candidate.zero_grad()
        with profile(activities=activities) as forward_backward:
            candidate.forward_backward()
    with profile(activities=activities) as optimizer:
        candidate.update()
    candidate.zero_grad()
    own: Callable[[Any], float] = (lambda e: e.self_device_time_total) if device == "cuda" else (
        lambda e: e.self_cpu_time_total)
    events = operations(forward_backward.events())
    parts = {}  # of forward operations, by sequence number
    for event in events:
        if event.sequence_nr >= 0 and not _in_backward(event):
            parts.setdefault(event.sequence_nr, _own_part(event))
    found: dict[str, float] = {}
    for event in events:
        backward = _in_backward(event)
        part = (parts.get(backward.sequence_nr) or _own_part(event)) if backward else _own_part(event)
        found[part or "rest"] = found.get(part or "rest", 0.0) + own(event) / 1000
    found["optimizer"] = sum(own(event) for event in operations(optimizer.events())) / 1000
    return found


def operations(events: Iterable[Any]) -> list[Any]:
    """The events of the host. Those of the device, which are listed too, are in the times of what started them."""
    return [event for event in events
            if event.device_type == DeviceType.CPU and not event.name.startswith("ProfilerStep")]


def _in_backward(event: Any) -> Any:
    """The node of the backward pass that an operation belongs to, or None."""
    while event is not None:
        if event.name.startswith("autograd::engine::evaluate_function"):
            return event
        event = event.cpu_parent
    return None


def peak_bytes(candidate: Any, device: str) -> int:
    """The most memory that forward and backward have allocated at once, beyond what was there before."""
    candidate.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        candidate.forward_backward()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        candidate.forward_backward()
    now = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
