"""Talk to a trained Mixtral in the terminal, in any layout.

The same as `megatron-mixtral chat`, from a clone that need not be installed; see docs/inference.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("chat")
