"""Data: from text files to the token datasets that the engine reads.

`tokenizer` (text to ids), `readers` (files to records), `encoding` (documents to arrays), `indexed` (arrays to
`.bin/.idx`), `workers` (processes) and `preprocess` (the command) need neither torch nor transformers, so that the
tool starts at once. So do those of instruction data: `instruction_records` (files to records), `instruction_formats`
(records to turns), `chat` (turns to ids and mask), `packing`, `instruction` (the command). `pretrain` and `sft` (the
datasets of a training run) need the engine. Importing this package imports none of them.
"""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.data.cli import inspect_dataset as inspect_dataset_command
    from megatron_mixtral.data.cli import merge as merge_command
    from megatron_mixtral.data.cli import preprocess as preprocess_command

__all__, __getattr__, __dir__ = door(__name__, __file__)
