"""Loss and perplexity of a trained Mixtral on texts or data sets, in any layout.

The same as `megatron-mixtral perplexity`, from a clone that need not be installed; see docs/evaluation.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("perplexity")
