"""What a training run reads. `build_*` import torch and the engine; all others need numpy alone, for checks ahead."""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.data.datasets.blend import blend_of, check_pretraining, sizes_of
    from megatron_mixtral.data.datasets.index_cache import identities
    from megatron_mixtral.data.datasets.instruction import build_instruction, row_tensors
    from megatron_mixtral.data.datasets.instruction_files import (
        InstructionFiles,
        check_instruction,
        instruction_blend,
    )
    from megatron_mixtral.data.datasets.pretraining import build_pretraining

__all__, __getattr__, __dir__ = door(__name__, __file__)
