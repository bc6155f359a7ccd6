#!/usr/bin/env python3
"""Average the throughput of a run: `tools/calc.py LOG [START END]`; see docs/training.md."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from megatron_mixtral.errors import MixtralError  # noqa: E402
from megatron_mixtral.training import calc_command  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 after one message on the standard error."""
    try:
        return calc_command(sys.argv[1:] if argv is None else argv)
    except MixtralError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
