"""Megatron-style 3D-parallel pretraining of Mixtral models, on PyPI's megatron-core.

Importing this package imports neither torch nor the engine; `docs/design.md` is the tour of the house.
"""

__version__ = "0.1.0"
