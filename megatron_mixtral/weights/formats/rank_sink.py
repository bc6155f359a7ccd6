"""Writing rank directories that the stock engine loads; see `rank_source` for their layout.

Every file holds what `megatron.training.checkpointing.generate_state_dict` puts there for a release checkpoint: args,
checkpoint_version, iteration, and the state dict of the local spec (`model`, or `model0`, `model1`, ... with virtual
stages) with its empty `_extra_state` entries.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_mixtral.config import TARGET_FLAGS, ParallelLayout
from megatron_mixtral.weights.engine_args import release_state
from megatron_mixtral.weights.files import file_layout
from megatron_mixtral.weights.formats.directory import RELEASE, identity_files
from megatron_mixtral.weights.formats.rank_source import FILE_NAME, LABEL, rank_names
from megatron_mixtral.weights.plan import all_plans, padded_vocabulary
from megatron_mixtral.weights.protocols import Output, TensorSource
from megatron_mixtral.weights.streaming import payload


class RankDirSink:
    """Rank directories of a layout, to be written at `target`.

    The vocabulary is padded to a multiple of `vocab_divisible_by` (None: 1) x the tensor parallel size.
    """

    def __init__(self, target: str | Path, layout: ParallelLayout | None = None, *,
                 vocab_divisible_by: int | None = None, replace: bool = False) -> None:
        self.target, self.replace = Path(target), replace
        self.layout, self.divisible_by = layout or ParallelLayout(), vocab_divisible_by or 1

    def plan(self, source: TensorSource, dtypes: dict[str, str]) -> Output:
        """One file for each shard, as `torch.save` would write it. Raises `ConfigError` for a layout that cannot be."""
        config, layout = source.config, self.layout.validate(source.config, TARGET_FLAGS)
        names, rows = rank_names(layout), padded_vocabulary(config, layout, self.divisible_by)
        beside = release_state(config, layout, rows, self.divisible_by, dtypes)
        contents: dict[str, dict[str, Any]] = {}
        for plan in all_plans(config, layout, rows):
            file = contents.setdefault(f"{RELEASE}/{names[plan.coord]}/{FILE_NAME}",
                                       beside | {LABEL: asdict(plan.coord)})
            file[f"model{plan.chunk}" if layout.vpp > 1 else "model"] = dict.fromkeys(plan.extra_states()) | {
                tensor.name: payload(tensor, source, dtypes) for tensor in plan.tensors()}
        return Output({path: file_layout.torch_archive(file) for path, file in contents.items()},
                      identity_files(config))
