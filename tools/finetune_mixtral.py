"""Fine-tune a Mixtral as a recipe says: a TOML file, or the name of one that comes along.

The same as `megatron-mixtral finetune`, from a clone that need not be installed; see docs/finetuning.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("finetune")
