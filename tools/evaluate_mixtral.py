"""Measure a trained Mixtral, in any layout: MMLU from a folder, or tasks of lm-eval.

The same as `megatron-mixtral evaluate`, from a clone that need not be installed; see docs/evaluation.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("evaluate")
