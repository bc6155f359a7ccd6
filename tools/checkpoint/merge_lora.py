"""Merge adapters into the model that they were trained on, into any form.

The same as `megatron-mixtral merge-lora`, from a clone that need not be installed; see docs/finetuning.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("merge-lora")
