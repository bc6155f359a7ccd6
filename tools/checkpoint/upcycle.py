#!/usr/bin/env python3
"""Make a Mixtral out of a dense Mistral or Llama: its MLP is every expert, the router is new; see docs/weights.md."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from a clone that is not installed

from megatron_mixtral.errors import MixtralError  # noqa: E402
from megatron_mixtral.weights import cli  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 after one message on the standard error."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return cli.upcycle(sys.argv[1:] if argv is None else argv)
    except MixtralError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
