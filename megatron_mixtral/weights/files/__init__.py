"""Files as bytes: mapped and read without running anything, laid out to the byte, written whole. Knows no Mixtral."""

from typing import TYPE_CHECKING

from megatron_mixtral._door import door

if TYPE_CHECKING:
    from megatron_mixtral.weights.files import atomic, file_layout, inert_pickle, pickle_writer, safetensors, writer
    from megatron_mixtral.weights.files.mapped import MappedFiles, Reader, Stored
    from megatron_mixtral.weights.files.torch_files import load_torch

__all__, __getattr__, __dir__ = door(__name__, __file__)
