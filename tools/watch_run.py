#!/usr/bin/env python3
"""Show one or more runs while they go on, in the terminal or on a page.

The same as `megatron-mixtral watch`, from a clone that need not be installed; see docs/training.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("watch")
