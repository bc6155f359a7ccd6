"""List the recipes of fine-tuning, and copy one to change it.

The same as `megatron-mixtral recipes`, from a clone that need not be installed; see docs/finetuning.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("recipes")
