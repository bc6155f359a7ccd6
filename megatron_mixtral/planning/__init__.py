"""What a run needs before it starts: memory, traffic, pipeline bubble, predicted step time. Standard library only.

`RunShape` says what is run; every other module derives one kind of figure from it. The training program prints them for
`--dry-run`, and `tools/plan_layout.py` ranks layouts by them.
"""

from megatron_mixtral.planning.shape import RunShape

__all__ = ["RunShape"]
