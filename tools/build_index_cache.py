"""Build the index cache of a training run ahead of it, in one process, from the run's own flags.

The same as `megatron-mixtral build-index-cache`, from a clone that need not be installed; see docs/data.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("build-index-cache")
