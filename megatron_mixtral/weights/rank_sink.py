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

import torch

from megatron_mixtral.config import CONFIG_FILE, TARGET_FLAGS, MixtralConfig, ParallelLayout
from megatron_mixtral.weights.engine_args import make_args
from megatron_mixtral.weights.fragments import OutputFile
from megatron_mixtral.weights.plan import ShardPlan, TensorSlice, all_plans, check_complete, padded_vocabulary
from megatron_mixtral.weights.rank_dirs import FILE_NAME, LABEL, TRACKER, rank_names

RELEASE = "release"


class RankDirSink:
    """Rank directories of a layout, to be written at `target`. Raises `ConfigError` for a layout that cannot be."""

    def __init__(self, target: str | Path, config: MixtralConfig, layout: ParallelLayout, *,
                 vocab_divisible_by: int = 1, replace: bool = False) -> None:
        self.target, self.config, self.replace = Path(target), config, replace
        self.layout = layout.validate(config, TARGET_FLAGS)
        self.divisible_by = vocab_divisible_by
        self.padded_vocab = padded_vocabulary(config, layout, vocab_divisible_by)
        self._names = rank_names(layout)

    def plan(self, dtypes: dict[str, torch.dtype]) -> list[OutputFile]:
        """One file for each shard."""
        plans = all_plans(self.config, self.layout, self.padded_vocab)
        check_complete(plans, self.config)
        files: dict[str, OutputFile] = {}
        for plan in plans:
            path = f"{RELEASE}/{self._names[plan.coord]}/{FILE_NAME}"
            key = f"model{plan.chunk}" if self.layout.vpp > 1 else "model"
            files.setdefault(path, OutputFile(path, {}, plan.coord)).groups[key] = plan.tensors()
        return list(files.values())

    def write(self, root: Path, file: OutputFile, dtypes: dict[str, torch.dtype],
              tensors: Iterable[tuple[TensorSlice, torch.Tensor]]) -> int:
        """Write one shard below `root`; memory is that of the shard's tensors that are not views of the source."""
        assert file.coord is not None, "a rank file has a coordinate"
        args = make_args(self.config, self.layout, self.padded_vocab, self.divisible_by, _main_dtype(dtypes))
        contents: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": 0,
                                    "num_floating_point_operations_so_far": 0, LABEL: asdict(file.coord)}
        supply, written = iter(tensors), 0
        for chunk, (key, group) in enumerate(file.groups.items()):
            plan = ShardPlan(self.config, self.layout, file.coord, chunk, self.padded_vocab)
            contents[key] = dict.fromkeys(plan.extra_states())
            for planned in group:
                found, data = next(supply)
                assert found is planned, f"{found.name} where {planned.name} is due"
                assert tuple(data.shape) == planned.shape, f"{planned.name}: {tuple(data.shape)}"
                contents[key][planned.name] = _alone(data)
                written += data.nbytes
        (root / file.path).parent.mkdir(parents=True)
        torch.save(contents, root / file.path)
        return written

    def finish(self, root: Path, companions: Iterable[Path]) -> None:
        """Write the configuration, the companion files and, last, the tracker that makes it a checkpoint."""
        (root / CONFIG_FILE).write_text(self.config.to_json(), encoding="utf-8")
        for path in companions:
            shutil.copyfile(path, root / path.name)
        (root / TRACKER).write_text(RELEASE, encoding="utf-8")


def _alone(data: torch.Tensor) -> torch.Tensor:
    """A tensor that has its storage to itself: `torch.save` writes the whole storage of a view."""
    return data if data.untyped_storage().nbytes() == data.nbytes else data.clone()


def _main_dtype(dtypes: dict[str, torch.dtype]) -> torch.dtype:
    """The type of most tensors: what `params_dtype` in the arguments says."""
    kinds = list(dtypes.values())
    return max(set(kinds), key=kinds.count)
