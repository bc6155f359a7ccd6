"""The commands of a training run: each takes its arguments, returns an exit status and raises `MixtralError`."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_mixtral.errors import DivergedError, MixtralError, RankLostError


def pretrain(argv: Sequence[str]) -> int:
    """Train; 0 when training ended as asked, 1 on a rank that leaves an error to rank 0."""
    from megatron_mixtral.training import pretrain as program

    try:
        program.run(list(argv))
    except (DivergedError, RankLostError):
        raise
    except MixtralError:
        if os.environ.get("RANK", "0") == "0":
            raise
        return 1
    return 0


def build_index_cache(argv: Sequence[str]) -> int:
    """Build the index cache that a run with these flags looks for."""
    from megatron_mixtral.training import pretrain as program

    program.build_index_cache(list(argv))
    return 0


def plot(argv: Sequence[str]) -> int:
    """Draw the pictures of runs and print where they are."""
    parser = argparse.ArgumentParser(description="Draw loss.png, throughput.png and expert_load.png of runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="folder of a run, or its metrics file")
    parser.add_argument("--output-dir", type=Path, help="default: beside the first run's metrics")
    args = parser.parse_args(argv)
    first = args.runs[0]
    from megatron_mixtral.training.metrics import plots

    for path in plots.draw(args.runs, args.output_dir or (first if first.is_dir() else first.parent)):
        print(path)
    return 0


def calc(argv: Sequence[str]) -> int:
    """Print the average throughput of a run's steps."""
    from megatron_mixtral.training.metrics import throughput

    parser = argparse.ArgumentParser(description="Average the tokens per second and device of a run's steps.")
    parser.add_argument("log", type=Path, help="metrics.jsonl, the training program's output, or a log of XTuner")
    parser.add_argument("start", type=int, nargs="?", help=f"first step (default: after the first {throughput.EDGE})")
    parser.add_argument("end", type=int, nargs="?", help=f"last step (default: before the last {throughput.EDGE})")
    args = parser.parse_args(argv)
    print(throughput.average(throughput.read(args.log), args.start, args.end))
    return 0
