"""Runs to be watched: steps in metrics.jsonl, and a process that holds the lease of a run."""

import json
from pathlib import Path

# A run of its own process, with the lease of one.
RUN = """import pathlib, sys
from megatron_mixtral.training.checkpoints.lease import acquire, this_process
held = acquire(pathlib.Path(sys.argv[1]), this_process({}))
print("held", flush=True)
sys.stdin.read()
held.release()
"""


def step(number: int, loss: float | None = 2.0, left: float = 10.0, **more: float) -> dict:
    return {"iteration": number, "lm_loss": loss, "grad_norm": 1.0, "learning_rate": 1e-3, "step_seconds": 1.0,
            "tokens_per_second_per_device": 100.0, "memory_bytes": 2**30, "expert_imbalance": 1.2,
            "expert_imbalance_worst": 1.5, "expert_imbalance_worst_layer": 3, "seconds_left": left, **more}


def write(folder: Path, *steps: dict, end: str = "\n") -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n".join(map(json.dumps, steps)) + end)
