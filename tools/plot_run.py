#!/usr/bin/env python3
"""Draw loss, throughput and load of the experts of one or more runs.

The same as `megatron-mixtral plot`, from a clone that need not be installed; see docs/training.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("plot")
