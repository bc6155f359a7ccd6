"""Recipes of fine-tuning: a TOML file with the flags of a run and of its data, from raw dialogues on.

`book` has those that come along, `recipe` reads one, `raw_data` makes its data set, and `cli` has the two commands.
"""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.training.recipes.cli import finetune, recipes

__all__, __getattr__, __dir__ = door(__name__, __file__)
