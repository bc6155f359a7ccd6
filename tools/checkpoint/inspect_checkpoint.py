#!/usr/bin/env python3
"""Say what a directory is: format, layout, architecture, tensors, types, sizes, whole or not; see docs/weights.md."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from a clone that is not installed

from megatron_mixtral.weights.inspection import inspect  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 for a whole directory, 1 for anything else."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Say what a model or checkpoint directory is, and if it is whole.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--deep", action="store_true",
                        help="read every tensor; compare with the checksums of a conversion made with --verify")
    args = parser.parse_args(argv)
    found = inspect(args.directory, deep=args.deep)
    print(found)
    return 0 if found.problem is None else 1


if __name__ == "__main__":
    sys.exit(main())
