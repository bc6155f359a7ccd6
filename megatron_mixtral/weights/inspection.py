"""What a directory is: its format, layout, architecture, tensors, types, sizes, iteration, and whether it is whole.

A directory is whole when `check` of its source finds nothing to refuse and it carries no mark of an unfinished
conversion; with `deep`, every byte of every tensor is read, too.
"""

import collections
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_mixtral.config import AdapterConfig, read_json
from megatron_mixtral.disk import human_size
from megatron_mixtral.errors import CheckpointError, MixtralError
from megatron_mixtral.weights.adapters import PeftSource
from megatron_mixtral.weights.conversion import REPORT_FILE, compare
from megatron_mixtral.weights.dtypes import FLOATS
from megatron_mixtral.weights.files import atomic
from megatron_mixtral.weights.formats import DistSource, HFSource
from megatron_mixtral.weights.formats import directory as names
from megatron_mixtral.weights.opening import open_source
from megatron_mixtral.weights.plan import hf_slices, whole
from megatron_mixtral.weights.rules import hf_tensors


@dataclass
class Findings:
    """What was found. `problem` is None for a whole directory."""

    directory: Path
    format: str = "unknown"
    iteration: str | None = None
    layout: str | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    tensors: int = 0
    types: dict[str, int] = field(default_factory=dict)  # tensors of each
    bytes: int = 0  # of the weights, each counted once
    bytes_on_disk: int = 0
    left_behind: list[str] = field(default_factory=list)
    checksums: dict[str, int] | None = None
    problem: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.directory}: {self.format}, {'whole' if self.problem is None else 'NOT WHOLE'}"]
        if self.problem is not None:
            lines.append(f"problem: {self.problem}")
        if self.iteration is not None:
            lines.append(f"iteration: {self.iteration}")
        if self.layout is not None:
            lines.append(f"layout: {self.layout}")
        if self.architecture:
            lines.append(f"{self.parameters:,} parameters: "
                         + ", ".join(f"{name} {value}" for name, value in self.architecture.items()))
        if self.tensors:
            types = ", ".join(f"{count} {name}" for name, count in sorted(self.types.items()))
            lines.append(f"{self.tensors} Hugging Face tensors ({types}), {human_size(self.bytes)}; "
                         f"{human_size(self.bytes_on_disk)} on the disk")
        if self.left_behind:
            lines.append(f"also holds: {', '.join(self.left_behind)}")
        if self.checksums is not None:
            lines.append(f"{len(self.checksums)} checksums equal those of the conversion that wrote it")
        return "\n".join(lines)


def inspect(directory: str | Path, *, deep: bool = False) -> Findings:
    """Look at a directory. `deep` reads every tensor, and compares it with the checksums of a verified conversion."""
    directory = Path(directory)
    found = Findings(directory)
    if directory.is_dir():
        found.bytes_on_disk = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    try:
        _look(found, deep)
    except MixtralError as error:
        found.problem = str(error)
    # Between its last note and its rename a directory is complete, but nobody has said that it is on the disk.
    if found.problem is None and atomic.is_unfinished(directory):
        found.problem = "a conversion did not end; start it again, with --resume to keep what is finished"
    return found


def _look(found: Findings, deep: bool) -> None:
    source = open_source(found.directory)
    found.format = ("Hugging Face" if isinstance(source, HFSource) else
                    "adapters in PEFT's form" if isinstance(source, PeftSource) else
                    "distributed checkpoint (torch_dist)" if isinstance(source, DistSource) else
                    "rank directories (torch)")
    if not isinstance(source, HFSource | PeftSource):
        number = names.iteration_of(source.where.name)
        found.iteration = source.where.name if number is None else str(number)
        found.layout = str(getattr(source, "layout", "any"))
    config = source.config
    if config.dense_config is not None:
        found.format += f", {config.model_type} (here a Mixtral of one expert)"
    found.architecture = {name: getattr(config, name) for name in (
        "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "head_dim", "num_local_experts", "num_experts_per_tok", "vocab_size", "tie_word_embeddings")}
    found.parameters, found.left_behind = config.total_parameters, list(source.left_behind)
    if isinstance(config, AdapterConfig):
        found.format += f", adapters of rank {config.rank} on {', '.join(config.targets)}"
        found.parameters = config.trained_parameters
    source.check()
    kinds: collections.Counter[str] = collections.Counter()
    stored = hf_slices(config) if isinstance(source, HFSource) else map(whole, hf_tensors(config).values())
    for tensor in stored:
        kind = source.dtype(tensor.pieces[0])
        kinds[kind] += 1
        found.bytes += tensor.elements * FLOATS[kind].itemsize
    found.types, found.tensors = dict(kinds), sum(kinds.values())
    if deep:
        sums = compare(source, source)
        source.mapped.check_sums()
        _compare_with_report(found, sums)


def _compare_with_report(found: Findings, sums: dict[str, int]) -> None:
    """Compare checksums with those that the conversion noted. Raises a `MixtralError` where they differ."""
    report = found.directory / REPORT_FILE
    noted = read_json(report).get("checksums") if report.is_file() else None
    if not noted:  # it was not verified
        return
    if not isinstance(noted, dict):
        raise CheckpointError(f"{report}: expected checksums by tensor, found {type(noted).__name__}; remove the file, "
                              "or convert again with --verify")
    wrong = [name for name, value in sums.items() if noted.get(name) != value]
    if wrong:
        raise CheckpointError(f"{len(wrong)} tensors are not what the conversion wrote ({report}), first {wrong[0]}")
    found.checksums = sums
