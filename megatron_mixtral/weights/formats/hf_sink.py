"""Writing Hugging Face directories: safetensors shards under the original names, their index and a config.json.

A shard's header is made from the plan, and the tensors' bytes are then streamed behind it.
Format: the safetensors specification (8 bytes little-endian header length, JSON header, data).
"""

import json
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_mixtral.config import MixtralConfig, read_json
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.weights.dtypes import FLOATS
from megatron_mixtral.weights.files.file_layout import Container, Placed
from megatron_mixtral.weights.formats.hf_source import INDEX_FILE, SINGLE_FILE
from megatron_mixtral.weights.plan import TensorSlice, whole
from megatron_mixtral.weights.protocols import OutputFile
from megatron_mixtral.weights.rules import hf_tensors

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}

# Fields of config.json that say how to compute; the template's must equal the checkpoint's.
ARCHITECTURE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "rope_theta",
                "rms_norm_eps", "sliding_window", "tie_word_embeddings")


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB" or "300MiB". Raises `ConfigError`."""
    upper = text.strip().upper()
    for unit, factor in sorted(UNITS.items(), key=lambda item: -len(item[0])):
        if upper.endswith(unit) and upper.removesuffix(unit).strip().replace(".", "", 1).isdigit():
            size = int(float(upper.removesuffix(unit)) * factor)
            if size > 0:
                return size
    raise ConfigError(f"--max-shard-size {text}: expected a size such as 5GB or 500MB")


class HFSink:
    """A Hugging Face directory to be written at `target`.

    `template` is a directory whose config.json is kept (its dtype aside); without one, it is made from the config.
    """

    carried: tuple[str, ...] = ()

    def __init__(self, target: str | Path, config: MixtralConfig, *, template: str | Path | None = None,
                 max_shard_size: str = "5GB", replace: bool = False) -> None:
        self.target, self.config, self.replace = Path(target), config, replace
        self.limit = parse_size(max_shard_size)
        self.template = None if template is None else self._check_template(Path(template) / "config.json")
        self._weight_map: dict[str, str] = {}
        self._total = 0
        self._types: set[str] = set()

    def _check_template(self, path: Path) -> dict[str, Any]:
        """The template's contents; raises `ConfigError` when it describes another network than the weights."""
        contents = read_json(path)
        other = MixtralConfig.from_hf_dict(contents, where=str(path))
        for name in ARCHITECTURE:
            ours, theirs = getattr(self.config, name), getattr(other, name)
            if ours != theirs:
                raise ConfigError(f"{path}: {name} is {theirs}, but the checkpoint's is {ours}; the folder given is of "
                                  "another model")
        return contents

    def plan(self, dtypes: dict[str, str]) -> list[OutputFile]:
        """The files to write; `dtypes` are the types the tensors will have, by name."""
        shards: list[list[TensorSlice]] = [[]]
        size = 0
        for tensor in map(whole, hf_tensors(self.config).values()):
            weight = tensor.elements * FLOATS[dtypes[tensor.name]].itemsize
            if shards[-1] and size + weight > self.limit:
                shards.append([])
                size = 0
            shards[-1].append(tensor)
            size += weight
        names = [SINGLE_FILE] if len(shards) == 1 else [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        return [OutputFile(name, {"": shard}) for name, shard in zip(names, shards, strict=True)]

    def container(self, file: OutputFile, dtypes: dict[str, str]) -> Container:
        """One shard laid out: the header first, then each tensor behind the other."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at, places = 0, []
        for planned in file.tensors():
            kind = FLOATS[dtypes[planned.name]]
            end = at + planned.elements * kind.itemsize
            header[planned.name] = {"dtype": kind.safetensors, "shape": list(planned.shape), "data_offsets": [at, end]}
            places.append((planned, kind.name, at))
            self._weight_map[planned.name] = file.path
            at = end
            self._types.add(kind.name)
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # the data must start at a multiple of 8
        head = struct.pack("<Q", len(encoded)) + encoded
        self._total += at
        placed = tuple(Placed(planned, kind, len(head) + start, b"" if start else head)
                       for planned, kind, start in places)
        return Container(len(head) + at, placed, len(head) + at, lambda crcs: b"")

    def finish(self, root: Path, companions: Iterable[Path]) -> None:
        """Write the index, config.json, and the companion files."""
        files = set(self._weight_map.values())
        if files != {SINGLE_FILE}:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(self._weight_map.items()))}
            (root / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (root / "config.json").write_text(json.dumps(self._config_json(), indent=2) + "\n", encoding="utf-8")
        for path in companions:
            if not (root / path.name).exists():
                shutil.copyfile(path, root / path.name)

    def _config_json(self) -> dict[str, Any]:
        name = max(sorted(self._types), key=lambda kind: FLOATS[kind].itemsize)
        if self.template is None:
            return self.config.to_hf_dict(dtype=name)
        keys = [key for key in ("dtype", "torch_dtype") if key in self.template] or ["torch_dtype"]
        return self.template | dict.fromkeys(keys, name)
