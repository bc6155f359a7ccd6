"""The candidates of `train_step.py`, each in a process of its own, which measures when it is asked.

In one process the heap that one leaves behind serves or hinders the next, and what this library sets for a process
(`runtime/cpu/heap.py`) would serve all. So each runs as it does for its users: with this library's heap or with
glibc's.
Several ranks (torchrun) hold all candidates in each rank's one process.
"""

import argparse
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

import step_breakdown
import step_candidates
import torch

from megatron_mixtral import runtime
from megatron_mixtral.config import MixtralConfig, ParallelLayout

# Present, but empty: `runtime.heap` leaves the heap alone, and glibc reads its defaults.
PLAIN_HEAP = {"GLIBC_TUNABLES": "", "THP_MEM_ALLOC_ENABLE": "0"}
WIDTHS = {
    "cuda": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "cpu": {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def architecture(args: argparse.Namespace, device: str) -> MixtralConfig:
    return MixtralConfig(num_hidden_layers=args.layers, num_local_experts=8, num_experts_per_tok=2,
                         max_position_embeddings=args.sequence, **WIDTHS[device])


class Here:
    """A candidate in this process; `initialize` of step_candidates has run."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.device = runtime.ready().device
        layout = ParallelLayout(tp=args.tp, ep=args.ep, world=torch.distributed.get_world_size())
        config = architecture(args, self.device)
        self.clock = time.process_time if args.processor_time else time.perf_counter
        self.candidate = step_candidates.MAKERS[name](config, layout, args, DTYPES[args.dtype])

    def ask(self, what: str) -> Any:
        """`forward_backward`, `step`: its seconds. `peak`: bytes. `breakdown`: milliseconds by part."""
        if what == "peak":
            return step_breakdown.peak_bytes(self.candidate, self.device)
        if what == "breakdown":
            return step_breakdown.breakdown(self.candidate, self.device)
        self.candidate.next_batch()
        self._synchronize()
        start = self.clock()
        getattr(self.candidate, what)()
        self._synchronize()
        taken = self.clock() - start
        self.candidate.zero_grad()
        return taken

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


class Apart:
    """The same, in a process of its own."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        own_heap = args.same_heap or name in step_candidates.OURS
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        with patch.dict(os.environ, {} if own_heap else PLAIN_HEAP):
            self._process = context.Process(target=_serve, args=(theirs, name, args), daemon=True)
            self._process.start()
        theirs.close()
        reason = self._pipe.recv()
        if reason is not None:
            raise step_candidates.NotHere(reason)

    def ask(self, what: str) -> Any:
        self._pipe.send(what)
        return self._pipe.recv()


def _serve(pipe: Connection, name: str, args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    step_candidates.initialize(runtime.ready(), args.tp, args.ep)
    try:
        here = Here(name, args)
    except step_candidates.NotHere as reason:
        pipe.send(str(reason))
        return
    pipe.send(None)
    while True:
        try:
            pipe.send(here.ask(pipe.recv()))
        except EOFError:  # the parent has ended
            return
