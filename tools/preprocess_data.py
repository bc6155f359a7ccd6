"""Tokenize text or dialogues into `.bin/.idx` datasets.

The same as `megatron-mixtral preprocess`, from a clone that need not be installed; see docs/data.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("preprocess")
