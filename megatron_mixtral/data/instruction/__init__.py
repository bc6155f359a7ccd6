"""Dialogues to indexed data sets for fine-tuning: `preprocess_instructions` runs it, `InstructionOptions` says what is
wanted.
"""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.data.instruction.options import HANDLER_NAMES, InstructionOptions
    from megatron_mixtral.data.instruction.run import preprocess_instructions

__all__, __getattr__, __dir__ = door(__name__, __file__)
