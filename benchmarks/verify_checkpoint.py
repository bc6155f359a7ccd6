"""What comparing a checkpoint with its sums costs: the engine's time for loading it, with and without.

    python benchmarks/verify_checkpoint.py FOLDER [--nproc 2] [--layers 2] [--times 3]

A run of one step with made-up data saves a checkpoint in FOLDER; then runs that load it and do nothing else take turns.
Both have the files in the page cache, as a restart of a job on its own node has: the worst case for the comparison,
since a slow file system makes the load longer and not the sums.
"""

import argparse
import dataclasses
import re
import statistics
import subprocess
import sys
from pathlib import Path

import _clone

from megatron_mixtral.config import CONFIG_FILE, preset
from megatron_mixtral.disk import human_size

RUN = ["--seq-length", "32", "--micro-batch-size", "1", "--mock-data", "--lr", "1e-4", "--eval-iters", "0",
       "--use-distributed-optimizer", "--train-iters", "1", "--save-interval", "1"]


def pretrain(save: Path, *flags: str) -> float | None:
    """Seconds that the slowest rank took for loading, None where nothing was loaded."""
    command = [sys.executable, "-m", "megatron_mixtral", "pretrain", *RUN, "--load", str(save), "--save", str(save)]
    done = subprocess.run([*command, *flags], cwd=_clone.ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    found = re.search(r"load-checkpoint \.*: \([\d.]+, ([\d.]+)\)", done.stdout + done.stderr)
    return float(found[1]) / 1000 if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    for name, default in (("nproc", 2), ("layers", 2), ("times", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    save = args.folder / "save"
    save.mkdir(parents=True)
    config = dataclasses.replace(preset("tiny"), hidden_size=512, intermediate_size=1792, num_hidden_layers=args.layers)
    (save / CONFIG_FILE).write_text(config.to_json())
    ranks = ["--nproc", str(args.nproc)]
    pretrain(save, *ranks)
    size = sum(path.stat().st_size for path in save.rglob("*") if path.is_file())
    compared, trusted = [], []
    for _ in range(args.times):
        trusted.append(pretrain(save, *ranks, "--no-verify-checkpoint"))
        compared.append(pretrain(save, *ranks))
    without, with_sums = statistics.median(trusted), statistics.median(compared)
    sys.stdout.write(f"{human_size(size)}, {args.nproc} ranks: {without:.2f} s without, {with_sums:.2f} s with the "
                     f"comparison ({with_sums / without:.2f}x)\n")


if __name__ == "__main__":
    main()
