"""Reading Hugging Face directories: safetensors or .bin files, one or many with an index.

Accepted are the original per-expert names (`block_sparse_moe.experts.N.w1`), which every published Mixtral has on
disk, and the fused names that transformers 5 uses in memory. Files are memory-mapped, so a tensor costs memory only
while its bytes are being copied. `hf_sink` writes such directories.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy

from megatron_mixtral.config import MixtralConfig, read_json
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.dtypes import FLOATS
from megatron_mixtral.weights.files import MappedFiles, Stored, load_torch, safetensors
from megatron_mixtral.weights.formats.directory import companions_of, file_beside
from megatron_mixtral.weights.protocols import Fragment, TensorSource
from megatron_mixtral.weights.rules import IGNORABLE_HF_SUFFIXES, HFTensor, hf_tensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BIN_FILE, BIN_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"  # what came before safetensors
WEIGHT_FILES = (INDEX_FILE, SINGLE_FILE, BIN_INDEX_FILE, BIN_FILE)
TIED_COPY, TIED_ORIGINAL = "lm_head.weight", "model.embed_tokens.weight"
BARE = TIED_ORIGINAL.removeprefix("model.")  # as AutoModel saves it: a model without an output layer


class HFSource(TensorSource):
    """A Hugging Face Mixtral directory. `config.json` says what must be in it; `check` compares.

    Raises `ConfigError` for a config.json this library cannot compute, `CheckpointError` for unreadable files.
    """

    signs = WEIGHT_FILES

    def __init__(self, directory: str | Path, config: MixtralConfig | None = None) -> None:
        self.where = Path(directory)
        self.config = MixtralConfig.from_hf_dir(self.where) if config is None else config
        self.left_behind: list[str] = []
        self.companions, self.mapped = companions_of(self.where), MappedFiles()
        self._files: dict[str, str] = {}  # by tensor
        self._tensors: dict[str, Stored] = {}
        self._open_all()

    # -- What is there -----------------------------------------------------------------------------------

    def _open_all(self) -> None:
        """Find every stored tensor; each file is opened once and compared with the index."""
        present = [name for name in WEIGHT_FILES if (self.where / name).exists()]
        present = [name for name in present if "bin" not in name] or present  # both kinds: the safe one
        if len(present) > 1:
            raise CheckpointError(f"{self.where} has both {present[0]} and {present[1]}; remove the one that is stale")
        if not present:
            raise CheckpointError(f"{self.where}: no {SINGLE_FILE} and no {INDEX_FILE} (nor {BIN_FILE} or its index); "
                                  "is it a Hugging Face model with weights?")
        if present[0] in (SINGLE_FILE, BIN_FILE):
            self._open(present[0])
            return
        index = self.where / present[0]
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: expected a weight_map of tensor names to files")
        for name, file in weight_map.items():
            file_beside(self.where, file, f"{index}: {name}")
        for file in sorted(set(weight_map.values())):
            stored = self._open(file)
            listed = {name for name, where in weight_map.items() if where == file}
            for name in sorted(stored ^ listed):
                has, lists = ("no", "lists") if name in listed else ("the", "does not list")
                raise CheckpointError(f"{self.where / file} has {has} tensor {name}, but {index.name} {lists} it there")

    def _open(self, file: str) -> set[str]:
        """Map a file; the names of its tensors."""
        mapped = self.mapped[self.where / file]
        if file.endswith(".bin"):
            tensors = load_torch(mapped, str(mapped.path))
            if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
                raise CheckpointError(f"{mapped.path}: expected a dictionary of tensors")
        else:
            tensors = safetensors.load_safetensors(mapped)
        self._tensors |= tensors
        self._files |= dict.fromkeys(tensors, file)
        return set(tensors)

    def check(self) -> None:
        """Raise `CheckpointError` naming tensor and file for anything missing, left over or of a wrong shape."""
        if BARE in self._files:
            raise CheckpointError(f"{self.where / self._files[BARE]} was saved by AutoModel: it has {BARE} where "
                                  f"{TIED_ORIGINAL} is expected, and no output layer; save the original model with "
                                  "AutoModelForCausalLM")
        used = {self._locate(tensor)[0] for tensor in self._stored()}
        self._check_tied_copy(used)
        extra = [n for n in self._files if n not in used and not n.endswith(IGNORABLE_HF_SUFFIXES)]
        if extra:
            raise CheckpointError(f"{self.where / self._files[extra[0]]}: {len(extra)} tensors that no "
                                  f"{self.config.model_type} of this config.json has, first {extra[0]}")

    def _stored(self) -> Iterable[HFTensor]:
        """The tensors that must be in the files."""
        return hf_tensors(self.config).values()

    def _check_tied_copy(self, used: set[str]) -> None:
        """Some tools store a tied output layer too; it must then be the embedding."""
        if self.config.tie_word_embeddings and TIED_COPY in self._files and TIED_COPY not in used:
            if not numpy.array_equal(self._read(TIED_COPY).data, self._read(TIED_ORIGINAL).data):
                raise CheckpointError(f"{self.where / self._files[TIED_COPY]}: {TIED_COPY} differs from "
                                      f"{TIED_ORIGINAL}, though config.json says tie_word_embeddings")
            used.add(TIED_COPY)

    def _locate(self, tensor: HFTensor) -> tuple[str, Stored]:
        """What holds a tensor, and its name. It is of the shape that config.json gives it."""
        shapes, fused = dict.fromkeys(tensor.names(), tensor.shape), tensor.fused()
        if fused is not None:
            rows, columns = tensor.shape
            shapes[fused.name] = (self.config.num_local_experts, fused.parts * rows, columns)
        names = [name for name in shapes if name in self._files]
        if len(names) > 1:
            raise CheckpointError(f"{self.where}: {tensor.name} is stored twice, as {', '.join(names)}")
        if not names:
            files = ", ".join(sorted(set(self._files.values())))
            raise CheckpointError(f"{self.where}: {tensor.name} is missing from {files}")
        name, found = names[0], self._read(names[0])
        if found.shape != shapes[name]:
            raise CheckpointError(f"{self.where / self._files[name]}: {name} has shape {found.shape}, expected "
                                  f"{shapes[name]} by config.json")
        return name, found

    # -- Reading -----------------------------------------------------------------------------------------

    def _read(self, name: str) -> Stored:
        """A stored tensor. Raises `CheckpointError` for one of another kind than weights have."""
        found = self._tensors[name]
        if not isinstance(found, Stored) or found.data is None:
            raise CheckpointError(f"{self.where / self._files[name]}: {name} has type "
                                  f"{getattr(found, 'dtype', type(found).__name__)}, expected one of "
                                  f"{', '.join(FLOATS)} (quantized weights cannot be converted)")
        return found

    def dtype(self, tensor: HFTensor) -> str:
        return self._locate(tensor)[1].dtype

    def fragments(self, tensor: HFTensor) -> list[Fragment]:
        """The whole tensor as one memory-mapped fragment."""
        name, found = self._locate(tensor)
        data, fused = found.data, tensor.fused()
        if fused is not None and name == fused.name:
            rows = tensor.shape[0]
            data = data[tensor.expert, fused.part * rows:(fused.part + 1) * rows]
        return [Fragment(0, tensor.view[tensor.rule.shard_dim], data.reshape(tensor.view), found.dtype,
                         f"{self.where / self._files[name]} ({name})")]
