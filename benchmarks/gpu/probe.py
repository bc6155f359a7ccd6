#!/usr/bin/env python3
"""What torch really does on this GPU: the parts that no CPU can test, each against a reference, and their speeds.

    python benchmarks/gpu/probe.py --json probe.json
    python benchmarks/gpu/probe.py --small --device cpu         tries the program itself, as the tests do

A line a check; `NO` with the reason where one fails. The exit status is 1 where one of a GPU's checks failed.
"""

# ruff: noqa: T201
import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _clone  # noqa: F401 - makes the imports below work
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402, N812

from megatron_mixtral import runtime  # noqa: E402
from megatron_mixtral.runtime import gpu  # noqa: E402

WIDE = SimpleNamespace(tokens=8192, hidden=4096, width=14336, heads=32, groups=8, head=128, sequence=4096, window=1024,
                       vocabulary=32000, square=8192, rounds=10)
SMALL = SimpleNamespace(tokens=64, hidden=32, width=48, heads=4, groups=2, head=16, sequence=48, window=16,
                        vocabulary=128, square=64, rounds=2)
EXPERTS = 8
HALF = torch.bfloat16


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def within(limit: float, **errors: float) -> dict[str, float]:
    assert all(error <= limit for error in errors.values()), f"above {limit:g}: {errors}"
    return errors


class Probe:
    """The checks; each returns its figures, or raises."""

    def __init__(self, device: str, sizes: SimpleNamespace) -> None:
        self.device, self.sizes = device, sizes
        torch.manual_seed(0)

    def random(self, *shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)

    def milliseconds(self, work: Callable[[], Any]) -> float:
        """The median of several, of the device where it is one."""
        work()
        taken = []
        for _ in range(self.sizes.rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end))
        return sorted(taken)[len(taken) // 2]

    # -- right -----------------------------------------------------------------------------------------------

    def product_into_fp32(self) -> Any:
        """A bf16 product added to an fp32 tensor in place: by the product itself, or by a pass of its own?"""
        grad, x = self.random(self.sizes.tokens, 64), self.random(self.sizes.tokens, 96)
        into = self.random(64, 96, dtype=torch.float32)
        exact, place = into.double() + grad.double().t() @ x.double(), into.data_ptr()
        gpu.add_product(into, grad, x)
        assert into.data_ptr() == place
        gpu.add_product(into, grad[:0], x[:0])
        return within(1e-2, error=off(into, exact))

    def grouped_product(self) -> Any:
        """Groups of uneven and of no rows, forward and for the gradient of the input."""
        counts = [5, 0, 30, 17, 0, 1, 12, 7]
        x = self.random(sum(counts), self.sizes.hidden)
        weight = self.random(EXPERTS, self.sizes.width, self.sizes.hidden)
        ends = gpu.group_ends(tuple(counts), x.device)
        y = F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
        back = F.grouped_mm(y, weight, offs=ends)
        exact = torch.cat([a.double() @ w.double().t() for a, w in zip(x.split(counts), weight, strict=True)])
        exact_back = torch.cat([a.double() @ w.double() for a, w in zip(y.split(counts), weight, strict=True)])
        return within(1e-2, forward=off(y, exact), backward=off(back, exact_back))

    def attention(self, window: int | None = None) -> Any:
        """Causal attention as the model has it, against fp64 with a mask: outputs, gradients, kernels, peak memory."""
        from megatron_mixtral.model import spec

        one, s = self.sizes, min(self.sizes.sequence, 512)
        config = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0, kv_channels=one.head,
                                 window_size=None if window is None else (min(window, s // 3) - 1, 0),
                                 attention_backend=None)
        module = spec.CausalAttention(config, 1, None, "self")
        inputs = [self.random(s, 1, heads, one.head).requires_grad_() for heads in (one.heads, one.groups, one.groups)]
        found = module(*inputs).float()
        weight = torch.randn_like(found)
        gradients = torch.autograd.grad((found * weight).sum(), inputs)
        wide = [x.detach().double().requires_grad_() for x in inputs]
        q, k, v = (x.permute(1, 2, 0, 3) for x in wide)
        k, v = (x.repeat_interleave(one.heads // one.groups, dim=1) for x in (k, v))
        scores = (q @ k.transpose(2, 3)) * module.scale
        places = torch.arange(s, device=scores.device)
        back = places[:, None] - places  # how far key j lies behind query i
        seen = (back >= 0) if module.window is None else (back >= 0) & (back < module.window)
        exact = scores.masked_fill(~seen, float("-inf")).softmax(3) @ v
        exact = exact.permute(2, 0, 1, 3).flatten(2)
        expected = torch.autograd.grad((exact * weight).sum(), wide)
        figures = within(3e-2, output=off(found, exact), gradients=max(map(off, gradients, expected)))
        return figures | self._kernels(lambda: module(*inputs))

    def _kernels(self, work: Callable[[], Any]) -> dict[str, Any]:
        if self.device == "cpu":
            return {}
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize()
        return {"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20,
                "kernels": sorted({event.key[:80] for event in profile.key_averages()})[:8]}

    def adam(self) -> Any:
        """Four steps of the fused kernel with the engine's state, against torch.optim.AdamW."""
        from megatron.core import optimizer

        ours, theirs = ([self.random(1000, dtype=torch.float32) for _ in range(3)] for _ in range(2))
        for a, b in zip(ours, theirs, strict=True):
            b.copy_(a)
        options = {"lr": 1e-2, "weight_decay": 0.1}
        pair = optimizer.Adam(ours, **options), torch.optim.AdamW(theirs, **options)
        for _ in range(4):
            for a, b in zip(ours, theirs, strict=True):
                a.grad = torch.randn_like(a)
                b.grad = a.grad.clone()
            for one in pair:
                one.step()
        return within(1e-6, error=max(map(off, ours, theirs)))

    def tokens_there_and_back(self) -> Any:
        """The moves of tokens in the engine's dispatcher: the same bits twice, and each token twice itself."""
        from megatron.core.transformer.moe import token_dispatcher as engine

        x = self.random(self.sizes.tokens, self.sizes.hidden).requires_grad_()
        chosen = torch.rand(self.sizes.tokens, EXPERTS, device=self.device).topk(2).indices
        map_te = torch.zeros(self.sizes.tokens, EXPERTS, dtype=torch.bool, device=self.device).scatter_(1, chosen, True)
        runs = []
        for _ in range(2):
            rows, _, order, *_ = engine.permute(x, map_te, None, 2 * self.sizes.tokens)
            back = engine.unpermute(rows, order, restore_shape=x.shape)
            runs.append((back.detach(), torch.autograd.grad(back.float().square().sum(), x)[0]))
        assert torch.equal(runs[0][0], 2 * x)
        same = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        assert same or self.device == "cpu", "two runs differ"
        return {"same_bits_twice": same}

    # -- fast ------------------------------------------------------------------------------------------------

    def speeds(self) -> Any:
        """TFLOP/s of products at Mixtral's width, beside that of a large square one; GB/s of a copy."""
        one = self.sizes
        square, large = self.random(one.square, one.square), self.random(16 * one.square, one.square)
        found = {"square": 2 * one.square**3 / self.milliseconds(lambda: square @ square) / 1e9,
                 "copy_gb_per_s": 2 * large.nbytes / self.milliseconds(large.clone) / 1e6}
        rows = 2 * one.tokens
        counts = [rows // EXPERTS + d for d in (one.tokens // 32, -(one.tokens // 32), 1, -1, 2, -2, 0, 0)]
        x, y = self.random(rows, one.hidden), self.random(rows, 2 * one.width)
        weight = self.random(EXPERTS, 2 * one.width, one.hidden)
        main = torch.zeros(weight.shape, device=self.device)
        ends, flops = gpu.group_ends(tuple(counts), x.device), 2 * rows * one.hidden * 2 * one.width
        parts = list(zip(x.split(counts), y.split(counts), weight, main, strict=True))

        def rounded() -> None:
            for a, b, _, into in parts:
                into.add_(b.t() @ a)

        ways = {"fc1_grouped": lambda: F.grouped_mm(x, weight.transpose(1, 2), offs=ends),
                "fc1_loop": lambda: [a @ w.t() for a, _, w, _ in parts],
                "input_gradient_grouped": lambda: F.grouped_mm(y, weight, offs=ends),
                "input_gradient_loop": lambda: [b @ w for _, b, w, _ in parts],
                "weight_gradient_in_place": lambda: [gpu.add_product(into, b, a) for a, b, _, into in parts],
                "weight_gradient_then_added": rounded}
        return found | {name: flops / self.milliseconds(way) / 1e9 for name, way in ways.items()}

    def moves(self) -> Any:
        """Milliseconds of what brings tokens back from their experts: atomic additions, or gathers."""
        one = self.sizes
        y = self.random(2 * one.tokens, one.hidden)
        token = torch.randperm(2 * one.tokens, device=self.device) % one.tokens
        rows = token.argsort(stable=True).view(one.tokens, 2)
        out = torch.zeros(one.tokens, one.hidden, device=self.device, dtype=HALF)
        return {"scatter_add": self.milliseconds(lambda: out.scatter_add_(0, token[:, None].expand(-1, one.hidden), y)),
                "gather_and_sum": self.milliseconds(lambda: y.index_select(0, rows.flatten()).view(
                    one.tokens, 2, one.hidden).sum(1))}

    def loss(self) -> Any:
        """Milliseconds of the output layer's forward and backward by the rows of a chunk."""
        one = self.sizes
        hidden, weight = self.random(one.tokens, one.hidden), self.random(one.vocabulary, one.hidden)
        into = torch.zeros(weight.shape, device=self.device)

        def work(rows: int) -> None:
            for part in hidden.split(rows):
                logits = (part @ weight.t()).float()
                grad = logits.sub_(logits.logsumexp(1, keepdim=True)).exp_().to(HALF)
                grad @ weight
                gpu.add_product(into, grad, part)

        return {rows: self.milliseconds(lambda rows=rows: work(rows)) for rows in
                (one.tokens // 8, one.tokens // 4, one.tokens // 2)}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small widths")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    if runtime.ready().device != args.device:
        print(f"NO   this machine is {runtime.ready()}")
        return 1
    probe = Probe(args.device, SMALL if args.small else WIDE)
    checks = {name: getattr(probe, name) for name in ("product_into_fp32", "grouped_product", "attention")}
    checks["attention_in_a_window"] = lambda: probe.attention(probe.sizes.window)
    checks |= {name: getattr(probe, name) for name in ("adam", "tokens_there_and_back", "speeds", "moves", "loss")}
    found: dict[str, Any] = {"torch": torch.__version__, "device": args.device, "failed": {}}
    for name, check in checks.items():
        try:
            found[name] = check()
            print(f"ok   {name}: {found[name]}", flush=True)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other checks are worth knowing
            found["failed"][name] = f"{type(error).__name__}: {error}"
            print(f"NO   {name}: {found['failed'][name][:300]}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
