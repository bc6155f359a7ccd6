"""Tokenize JSON lines into `.bin/.idx` datasets; see docs/data.md."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a clone that is not installed
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads have nothing to do here, and hinder a quick fork

from megatron_mixtral.data.preprocess import run as preprocess  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    return preprocess.main(argv, os.environ)


if __name__ == "__main__":
    sys.exit(main())
