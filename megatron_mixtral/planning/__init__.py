"""What a run needs before it starts: memory, communication volume, pipeline bubble, predicted step time.

Standard library only. `RunShape` says what is run; every other module derives one kind of figure from it. A training
run prints them for `--dry-run`, and the planner (`plan_command`) ranks layouts by them.
"""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.planning.cli import plan as plan_command
    from megatron_mixtral.planning.memory import fullest_stage, stage_memory
    from megatron_mixtral.planning.report import describe
    from megatron_mixtral.planning.search import RESERVED
    from megatron_mixtral.planning.shape import CacheShape, RunShape
    from megatron_mixtral.planning.step_time import Machine, model_flops_rate, predicted_step
__all__, __getattr__, __dir__ = door(__name__, __file__)
