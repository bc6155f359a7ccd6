"""What a run keeps in a distributed checkpoint beside the weights, for a conversion that takes it over.

The optimizer's tensors, the counters and the arguments, the states of schedule, data and random numbers are copied as
they are stored: every entry is an archive of its own inside a .distcp file, and says nothing about where it lies. So a
run goes on from the converted checkpoint as from the original. `dist_sink` writes it; only `weights.cli` asks for it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights.formats.dist_metadata import COMMON, COMMON_FILE, Region, StoredTensor
from megatron_mixtral.weights.formats.dist_source import STATE_PREFIXES, DistSource, state_names
from megatron_mixtral.weights.rules import EMBEDDING, RULES, dist_names

OPTIMIZER_PREFIXES = ("optimizer.", "chained_")
_BY_LAYER = re.compile(r"decoder\.layers\.\d+\.")


@dataclass(frozen=True)
class RunState:
    """Entries of a distributed checkpoint under the keys that they are written with, and the run's iteration.

    Among `tensors` are the embedding and the output layer: a run trains the padded rows of its vocabulary, too, and
    goes on with the same losses only if they stay (`vocab_rows` with them).
    """

    iteration: int
    vocab_rows: int
    tensors: dict[str, StoredTensor]
    objects: dict[str, Region]
    common_file: Path | None  # where older engines put the common state

    @property
    def names(self) -> tuple[str, ...]:
        """What it holds, for the report."""
        return tuple(state_names((*self.tensors, *self.objects)))

    def sizes(self) -> list[tuple[str, int]]:
        """Every entry with its bytes."""
        return [*((key, sum(chunk.region.length for chunk in stored.chunks)) for key, stored in self.tensors.items()),
                *((key, region.length) for key, region in self.objects.items())]


def run_state(source: DistSource) -> RunState | None:
    """What `source` holds beside weights; None for one without an optimizer, which no run can go on from.

    Raises `CheckpointError` where it cannot be taken over.
    """
    contents = source.contents
    if not any(key.startswith(OPTIMIZER_PREFIXES) for key in (*contents.tensors, *contents.objects)):
        return None
    iteration = re.fullmatch(r"iter_(\d+)", source.where.name)
    common_file = source.where / COMMON_FILE
    if iteration is None or (COMMON not in contents.objects and not common_file.is_file()):
        raise CheckpointError(f"{source.where}: holds an optimizer's state, but is not the iter_NNNNNNN of a run with "
                              "its counters; give --no-load-optim to convert the weights alone")
    weights = [key for rule in RULES if rule.padded for key in rule.dist_keys]
    tensors: dict[str, StoredTensor] = {}
    for key, stored in contents.tensors.items():
        if key in weights or key.startswith(STATE_PREFIXES):
            if _BY_LAYER.search(key):
                raise CheckpointError(f"{source.where}: the optimizer's state is stored layer by layer ({key}), the "
                                      "weights will be stored together; give --no-load-optim to convert them alone")
            if tensors.setdefault(dist_names(key)[0], stored) != stored:
                raise CheckpointError(f"{source.where}: {dist_names(key)[0]} is stored twice; give --no-load-optim to "
                                      "convert the weights alone")
    objects = {key: region for key, region in contents.objects.items() if key.startswith(STATE_PREFIXES)}
    return RunState(int(iteration[1]), tensors[EMBEDDING.dist_keys[0]].size[0], tensors, objects,
                    None if COMMON in objects else common_file)
