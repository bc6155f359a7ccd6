"""A step whose gradient is not finite leaves the weights and the optimizer as they were."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import engine
from helpers.models import tiny_hf_mixtral
from helpers.ranks import run_ranks

from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.weights import convert, open_sink, open_source


def _train_poisoned(rank: int, *args: Any, step: int, value: float) -> Any:
    """`engine.train` in which the last rank's gradient of step `step` holds `value`."""
    from megatron.core.distributed import distributed_data_parallel as ddp

    original, calls = ddp.DistributedDataParallel.zero_grad_buffer, []

    def zero_grad_buffer(self: Any) -> None:
        original(self)
        calls.append(1)
        if len(calls) == step + 1 and rank == torch.distributed.get_world_size() - 1:
            self.buffers[0].grad_data[0] = value

    ddp.DistributedDataParallel.zero_grad_buffer = zero_grad_buffer
    return engine.train(rank, *args, skip_threshold=sys.float_info.max)


def _poisoned(rank: int, checkpoint: str, sizes: dict, batches: torch.Tensor, step: int, value: float) -> Any:
    return _train_poisoned(rank, checkpoint, sizes, batches, 1e-3, step=step, value=value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("sizes", "world"), [({"pp": 2}, 2), ({"ep": 2}, 2)], ids=["pp2", "ep2"])
def test_the_step_is_skipped(sizes: dict[str, int], world: int, value: float, tmp_path: Path) -> None:
    convert(open_source(tiny_hf_mixtral(tmp_path / "hf")),
            open_sink(tmp_path / "ranks", "torch", ParallelLayout(**sizes)))
    batches = torch.randint(3, 96, (3, 4, 33), generator=torch.Generator().manual_seed(7))
    arguments = (str(tmp_path / "ranks"), sizes)
    skipped = [one for one in run_ranks(world, _poisoned, *arguments, batches, 1, value) if one is not None]
    without = [one for one in run_ranks(world, engine.train, *arguments, batches[[0, 2]], 1e-3) if one is not None]
    for (losses, norms), (expected, expected_norms) in zip(skipped, without, strict=True):
        assert math.isinf(norms[1])
        assert [losses[0], losses[2]] == expected and [norms[0], norms[2]] == expected_norms
