"""Join `.bin/.idx` datasets into one.

The same as `megatron-mixtral merge`, from a clone that need not be installed; see docs/data.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("merge")
