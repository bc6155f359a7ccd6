#!/usr/bin/env python3
"""Average the throughput of a run: `LOG [START END]`.

The same as `megatron-mixtral calc`, from a clone that need not be installed; see docs/training.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("calc")
