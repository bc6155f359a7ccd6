"""Makes the clone around this file importable, installed or not, and runs a command of it.

Python looks for modules beside the program that it starts, so `benchmarks/`, `benchmarks/gpu/` and `tools/checkpoint/`
have links to this file. The clone comes first: its programs run its own code, whatever else is installed.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def run(command: str) -> None:
    """End the process as `megatron-mixtral COMMAND` with the process's arguments would."""
    from megatron_mixtral import __main__ as commands

    sys.exit(commands.run(command, sys.argv[1:]))
