"""Rank the parallel layouts of a Mixtral that fit a machine, by predicted step time.

The same as `megatron-mixtral plan`, from a clone that need not be installed; see docs/parallelism.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("plan")
