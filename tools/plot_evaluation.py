"""Draw the accuracies of evaluations by subject, beside those of other models.

The same as `megatron-mixtral plot-evaluation`, from a clone that need not be installed; see docs/evaluation.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("plot-evaluation")
