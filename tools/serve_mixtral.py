"""Serve a trained Mixtral in any layout: OpenAI's API and a chat page.

The same as `megatron-mixtral serve`, from a clone that need not be installed; see docs/inference.md.
"""

import _clone

if __name__ == "__main__":
    _clone.run("serve")
