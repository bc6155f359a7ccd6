"""Every flag of the pinned engine's parser: its form (`parser.json`), what becomes of it here (`verdicts.toml`), the
refusals that follow, and the page of the documentation. Standard library only.
"""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.training.engine_flags import help
    from megatron_mixtral.training.engine_flags.page import page
    from megatron_mixtral.training.engine_flags.refusals import check, check_device, check_model
    from megatron_mixtral.training.engine_flags.table import PARSER, EngineFlag, engine, flags, verdicts

__all__, __getattr__, __dir__ = door(__name__, __file__)
