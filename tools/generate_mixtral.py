"""Continue prompts with a trained Mixtral, in any layout: one JSON object a line.

The same as `megatron-mixtral generate`, from a clone that need not be installed; see docs/inference.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("generate")
