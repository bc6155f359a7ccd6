"""What a trained Mixtral knows: MMLU without a network and every task of lm-eval, in any layout. docs/evaluation.md.

Read in this order: `harness` (lm-eval's questions to the engine's scorings), `mmlu` (folders to lm-eval's tasks),
`tasks` (one after another, each kept when it is finished), `report` (results, table, what they depend on), `cli`.
"""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.evaluation import cli, perplexity, report
    from megatron_mixtral.evaluation.harness import Harness
    from megatron_mixtral.evaluation.mmlu import Mmlu, read_mmlu
    from megatron_mixtral.evaluation.tasks import check_names, evaluate

__all__, __getattr__, __dir__ = door(__name__, __file__)
