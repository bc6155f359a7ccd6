"""What the ranks tell one another in a step, over a group of gloo's, which waits without spinning: the control group.

Rank 0 tells what is asked for; the first tensor-parallel rank of each replica's last stage tells what it chose.
"""

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_mixtral.errors import RankLostError
from megatron_mixtral.inference.parameters import TokenLogprobs
from megatron_mixtral.runtime import lost_a_rank


class Lockstep:
    """The control group of all ranks. A process by itself asks nobody."""

    def __init__(self, silence: float) -> None:
        """Every rank makes one. `silence`: seconds that a rank waits for another one."""
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=silence)) if self.world > 1 else None

    def tell(self, commands: Sequence[Any]) -> Sequence[Any]:
        """Rank 0's commands, on every rank. Without any it costs one broadcast of 8 bytes."""
        if self._group is None:
            return commands
        with others_needed():
            content = pickle.dumps(list(commands)) if commands else b""
            size = torch.tensor(len(content))
            dist.broadcast(size, 0, group=self._group)
            if not int(size):
                return []
            if self.rank:
                content = bytearray(int(size))
            received = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            dist.broadcast(received, 0, group=self._group)
            return pickle.loads(received.numpy().tobytes())  # noqa: S301 - from our own rank 0

    def share(self, counts: Sequence[int], top: int, chosen: Sequence[TokenLogprobs] | None,
              replica: int) -> list[list[TokenLogprobs]]:
        """What every replica chose: `counts[r]` tokens of replica r, with up to `top` most probable ones each. `chosen`
        are those of `replica`, on the rank that speaks for it, and None on all others.
        """
        if self._group is None:
            return [list(chosen or ())]
        # Ids and log-probs are exact as float64, and all places but one are zeros: a sum puts them together.
        table = torch.zeros(sum(counts), 2 + 2 * top, dtype=torch.float64)
        if chosen is not None:
            first = sum(counts[:replica])
            for place, one in enumerate(chosen, first):
                flat = [one.token_id, one.logprob, *(value for pair in one.top for value in pair)]
                table[place, :len(flat)] = torch.tensor(flat, dtype=torch.float64)
                table[place, len(flat)::2] = -1  # no token: fewer were asked for
        if table.numel():
            with others_needed():
                dist.all_reduce(table, group=self._group)
        found = [TokenLogprobs(int(token), logprob, tuple(
            (int(one), its) for one, its in zip(rest[::2], rest[1::2], strict=True) if one >= 0))
            for token, logprob, *rest in table.tolist()]
        ends = [sum(counts[:replica + 1]) for replica in range(len(counts))]
        return [found[end - count:end] for end, count in zip(ends, counts, strict=True)]


@contextmanager
def others_needed() -> Iterator[None]:
    """What fails in here because another rank has ended, fails with a sentence: `RankLostError`."""
    try:
        yield
    except RuntimeError as error:
        if lost_a_rank(error):
            raise RankLostError("another rank has ended, or was silent for too long: this one cannot go on without it. "
                                "torchrun's report names the first one that ended") from error
        raise
