"""Rank the parallel layouts of a Mixtral that fit a machine, by predicted step time. See docs/parallelism.md.

    python tools/plan_layout.py --model mixtral-8x7b --devices 64 --global-batch-size 256
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mixtral.errors import MixtralError
from megatron_mixtral.planning import cli


def main(argv: list[str]) -> int:
    """Print the ranking; 0, or 1 with a sentence where nothing fits."""
    try:
        for line in cli.lines(argv):
            print(line)
    except MixtralError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
