"""What a run tells of itself: the metrics of each step, the load of its experts, and what is made of them later.

`hooks.install` is for the run itself. `throughput` and `plots` read what a run wrote, and need no torch.
"""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.training.metrics import evaluation, plots, throughput
    from megatron_mixtral.training.metrics.expert_load import ExpertLoad, Imbalance
    from megatron_mixtral.training.metrics.hooks import install
    from megatron_mixtral.training.metrics.waiting import Waiting
__all__, __getattr__, __dir__ = door(__name__, __file__)
