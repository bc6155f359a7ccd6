"""Data: from text files to the token data sets that the engine reads.

`corpus` (files to records), `text` and `instruction` (records to data sets, in worker processes), `indexed` (the
`.bin/.idx` pairs) need neither torch nor the engine, so that the commands start at once. `datasets`, what a training
run reads, is the only part that imports the engine.
"""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.data.cli import default_workers
    from megatron_mixtral.data.cli import inspect_dataset as inspect_dataset_command
    from megatron_mixtral.data.cli import merge as merge_command
    from megatron_mixtral.data.cli import preprocess as preprocess_command
    from megatron_mixtral.data.preprocessing import preprocess

__all__, __getattr__, __dir__ = door(__name__, __file__)
