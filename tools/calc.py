#!/usr/bin/env python3
"""Average the throughput of a run: `tools/calc.py LOG [START END]`; see docs/training.md."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from megatron_mixtral.errors import MixtralError  # noqa: E402
from megatron_mixtral.training.metrics import throughput  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 after one message on the standard error."""
    parser = argparse.ArgumentParser(description="Average the tokens per second and device of a run's steps.")
    parser.add_argument("log", type=Path, help="metrics.jsonl, the training program's output, or a log of XTuner")
    parser.add_argument("start", type=int, nargs="?", help=f"first step (default: after the first {throughput.EDGE})")
    parser.add_argument("end", type=int, nargs="?", help=f"last step (default: before the last {throughput.EDGE})")
    args = parser.parse_args(argv)
    try:
        print(throughput.average(throughput.read(args.log), args.start, args.end))
    except MixtralError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
