"""Say what a directory is: format, layout, architecture, tensors, types, sizes, whole or not.

The same as `megatron-mixtral inspect`, from a clone that need not be installed; see docs/weights.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("inspect")
