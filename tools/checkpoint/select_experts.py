"""Keep some experts of a Mixtral, for example 8x7B to 4x7B, as a Hugging Face directory.

The same as `megatron-mixtral select-experts`, from a clone that need not be installed; see docs/weights.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("select-experts")
