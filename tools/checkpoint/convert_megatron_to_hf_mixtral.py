#!/usr/bin/env python3
"""Convert a Megatron checkpoint of a Mixtral to Hugging Face.

The same as `megatron-mixtral convert-to-hf`, from a clone that need not be installed; see docs/weights.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("convert-to-hf")
