"""Writing rank directories that the stock engine loads; see `rank_dirs` for their layout.

Every file holds what `megatron.training.checkpointing.generate_state_dict` puts there for a release checkpoint: args,
checkpoint_version, iteration, and the state dict of the local spec (`model`, or `model0`, `model1`, ... with virtual
stages) with its empty `_extra_state` entries.
"""

import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_mixtral.config import CONFIG_FILE, TARGET_FLAGS, MixtralConfig, ParallelLayout
from megatron_mixtral.weights.engine_args import make_args
from megatron_mixtral.weights.files.file_layout import Container, tensor_reference, torch_archive
from megatron_mixtral.weights.formats.rank_source import FILE_NAME, LABEL, TRACKER, rank_names
from megatron_mixtral.weights.plan import ShardPlan, TensorSlice, all_plans, check_complete, padded_vocabulary
from megatron_mixtral.weights.protocols import OutputFile, stored_type

RELEASE = "release"


class RankDirSink:
    """Rank directories of a layout, to be written at `target`. Raises `ConfigError` for a layout that cannot be."""

    carried: tuple[str, ...] = ()

    def __init__(self, target: str | Path, config: MixtralConfig, layout: ParallelLayout, *,
                 vocab_divisible_by: int = 1, replace: bool = False) -> None:
        self.target, self.config, self.replace = Path(target), config, replace
        self.layout = layout.validate(config, TARGET_FLAGS)
        self.divisible_by = vocab_divisible_by
        self.padded_vocab = padded_vocabulary(config, layout, vocab_divisible_by)
        self._names = rank_names(layout)

    def plan(self, dtypes: dict[str, str]) -> list[OutputFile]:
        """One file for each shard."""
        plans = all_plans(self.config, self.layout, self.padded_vocab)
        check_complete(plans, self.config)
        files: dict[str, OutputFile] = {}
        for plan in plans:
            path = f"{RELEASE}/{self._names[plan.coord]}/{FILE_NAME}"
            key = f"model{plan.chunk}" if self.layout.vpp > 1 else "model"
            files.setdefault(path, OutputFile(path, {}, plan.coord)).groups[key] = plan.tensors()
        return list(files.values())

    def container(self, file: OutputFile, dtypes: dict[str, str]) -> Container:
        """One shard's file laid out as `torch.save` would write it."""
        assert file.coord is not None, "a rank file has a coordinate"
        args = make_args(self.config, self.layout, self.padded_vocab, self.divisible_by, main_type(dtypes))
        contents: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": 0,
                                    "num_floating_point_operations_so_far": 0, LABEL: asdict(file.coord)}
        tensors: list[tuple[TensorSlice, str]] = []
        for chunk, (key, group) in enumerate(file.groups.items()):
            plan = ShardPlan(self.config, self.layout, file.coord, chunk, self.padded_vocab)
            contents[key] = dict.fromkeys(plan.extra_states())
            for planned in group:
                kind = stored_type(planned, dtypes)
                contents[key][planned.name] = tensor_reference(len(tensors), kind, planned.shape)
                tensors.append((planned, kind))
        return torch_archive(contents, tensors)

    def finish(self, root: Path, companions: Iterable[Path]) -> None:
        """Write the configuration, the companion files and, last, the tracker that makes it a checkpoint."""
        (root / CONFIG_FILE).write_text(self.config.to_json(), encoding="utf-8")
        for path in companions:
            shutil.copyfile(path, root / path.name)
        (root / TRACKER).write_text(RELEASE, encoding="utf-8")


def main_type(dtypes: dict[str, str]) -> str:
    """The type of most tensors: what `params_dtype` in the arguments says."""
    kinds = list(dtypes.values())
    return max(sorted(set(kinds)), key=kinds.count)
