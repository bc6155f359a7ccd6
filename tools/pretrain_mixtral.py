"""Pretrain a Mixtral with tensor, pipeline, expert and data parallelism. Start it with torchrun; see docs/training.md.

    torchrun --nproc-per-node 8 tools/pretrain_mixtral.py --model mixtral-8x7b --tensor-model-parallel-size 4 ...

All of Megatron's flags, and ours: --model, --hf-checkpoint, --metrics-file.
"""

import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mixtral.errors import DivergedError, MixtralError, RankLostError
from megatron_mixtral.training import pretrain


def main(argv: list[str]) -> int:
    """Run; 0 when training ended as asked, 1 with one sentence when it cannot start, or cannot go on."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        pretrain.run(argv)
    except MixtralError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, (DivergedError, RankLostError)):
            print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
