"""Show and check a `.bin/.idx` dataset.

The same as `megatron-mixtral inspect-dataset`, from a clone that need not be installed; see docs/data.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("inspect-dataset")
