"""Build the index cache of a training run ahead of it, in one process, from the run's own flags. See docs/data.md.

    WORLD_SIZE=16 python tools/build_index_cache.py --model mixtral-8x7b --tensor-model-parallel-size 4 ...

On machines that share no storage run it on each of them: the run then finds its cache wherever it starts.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mixtral.errors import MixtralError
from megatron_mixtral.training import pretrain


def main(argv: list[str]) -> int:
    """0 when the cache is there, 1 with one sentence otherwise."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        pretrain.build_index_cache(argv)
    except MixtralError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
