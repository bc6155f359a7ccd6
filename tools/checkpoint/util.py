#!/usr/bin/env python3
"""Convert Mixtral weights between Hugging Face and Megatron, and between Megatron layouts.

The same as `megatron-mixtral convert`, from a clone that need not be installed; see docs/weights.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("convert")
