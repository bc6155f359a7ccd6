"""Pretrain a Mixtral with tensor, pipeline, expert and data parallelism.

The same as `megatron-mixtral pretrain`, from a clone that need not be installed; see docs/training.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("pretrain")
