"""What a run needs before it starts: memory, traffic, pipeline bubble, predicted step time. Standard library only.

`RunShape` says what is run; every other module derives one kind of figure from it. The training program prints them for
`--dry-run`, and `tools/plan_layout.py` ranks layouts by them.
"""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.planning.cli import plan_command
    from megatron_mixtral.planning.shape import RunShape

__all__, __getattr__, __dir__ = door(__name__, __file__)
