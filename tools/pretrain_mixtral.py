"""Pretrain a Mixtral with tensor, pipeline, expert and data parallelism; see docs/training.md.

    python tools/pretrain_mixtral.py --model mixtral-8x7b --tensor-model-parallel-size 4 ...

Started plainly it starts its own ranks; under torchrun and srun it is one of them. All of Megatron's flags, and ours:
`--help` lists both.
"""

import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mixtral.errors import DivergedError, MixtralError, RankLostError
from megatron_mixtral.training import pretrain_command


def main(argv: list[str]) -> int:
    """Run; 0 when training ended as asked, 1 with one sentence when it cannot start, or cannot go on."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return pretrain_command(argv)
    except MixtralError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, (DivergedError, RankLostError)):
            print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
