#!/usr/bin/env python3
"""Draw loss, throughput and load of the experts of one or more runs; see docs/training.md."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from megatron_mixtral.errors import MixtralError  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 after one message on the standard error."""
    parser = argparse.ArgumentParser(description="Draw loss.png, throughput.png and expert_load.png of runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="folder of a run, or its metrics file")
    parser.add_argument("--output-dir", type=Path, help="default: beside the first run's metrics")
    args = parser.parse_args(argv)
    first = args.runs[0]
    try:
        from megatron_mixtral.training.metrics import plots as pictures

        for path in pictures.draw(args.runs, args.output_dir or (first if first.is_dir() else first.parent)):
            print(path)
    except MixtralError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
