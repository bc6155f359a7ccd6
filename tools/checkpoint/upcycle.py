"""Make a Mixtral out of a dense Mistral or Llama: its MLP is every expert, the router is new.

The same as `megatron-mixtral upcycle`, from a clone that need not be installed; see docs/weights.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("upcycle")
