"""Rotary positions and the moves of tokens, as a GPU makes them, against the engine's: outputs and gradients."""

from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks

SEQUENCE, HEADS, WIDTH, TOKENS, EXPERTS, CHOSEN, HIDDEN = 24, 3, 16, 50, 8, 2, 12
CLOSE = {"rtol": 0.0, "atol": 1e-6}


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weight = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return (output, *torch.autograd.grad((output * weight).sum(), inputs))


def rotations(rank: int) -> list[str]:
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_mixtral.runtime.gpu import rotation

    angles = torch.outer(torch.arange(SEQUENCE).float(), 1e6 ** -(torch.arange(0, WIDTH, 2) / WIDTH))
    freqs = torch.cat((angles, angles), -1)[:, None, None]
    x = torch.randn(SEQUENCE, 2, HEADS, WIDTH, requires_grad=True)
    expected = gradients(rope_utils._apply_rotary_pos_emb_bshd(x, freqs), x)
    for one, other in zip(gradients(rotation.rotated(x, freqs), x), expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    made = freqs.rotations
    rotation.rotated(x, freqs)
    assert freqs.rotations is made  # once, not in every layer
    group = torch.distributed.group.WORLD
    for ends in ([0, 5, 5, 16, SEQUENCE], [0, SEQUENCE]):
        bounds, packed = torch.tensor(ends, dtype=torch.int32), x[:, 0]
        longest = int(bounds.diff().max())
        table = freqs[:longest]
        expected = gradients(rope_utils._apply_rotary_pos_emb_thd(packed, bounds, table, cp_group=group), x)
        for one, other in zip(gradients(rotation.rotated(packed, table, bounds), x), expected, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
    half = x.detach().bfloat16()
    return [str(rotation.rotated(half, freqs).dtype), str(rotation.positions(torch.tensor([0, 2, 2, 5]), 5).tolist())]


def test_rotary_positions_are_the_engines() -> None:
    assert run_ranks(1, rotations) == [["torch.bfloat16", "[0, 1, 0, 1, 2]"]]


def routing() -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.randn(TOKENS, EXPERTS)
    scores[:, 3] -= 9  # nobody's expert
    chosen = scores.topk(CHOSEN, dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True), scores.softmax(1).requires_grad_()


def moves(rank: int) -> Any:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    from megatron_mixtral.runtime.gpu import permutation

    map_te, probs = routing()
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    rows, probs_r, order, *_ = moe_utils.permute(x, map_te, probs, TOKENS * CHOSEN)
    found, found_probs, found_order = permutation.spread(x, map_te, probs, TOKENS * CHOSEN)
    assert torch.equal(found_order, order) and torch.equal(found, rows) and torch.equal(found_probs, probs_r)
    for one, other in zip(gradients(found, x), gradients(rows, x), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    y = torch.randn(TOKENS * CHOSEN, HIDDEN, requires_grad=True)
    expected = gradients(moe_utils.unpermute(y, order, x.shape), y)
    for one, other in zip(gradients(permutation.gather(y, found_order), y), expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    # In the engine's dispatcher: a CPU keeps the engine's moves, and chunks in order are not copied.
    assert not hasattr(token_dispatcher.permute(x, map_te, probs, TOKENS * CHOSEN)[2], "rows")
    sizes = torch.tensor([20, 30, TOKENS])
    same, _ = token_dispatcher.sort_chunks_by_idxs(y, sizes, torch.arange(3))
    other, _ = token_dispatcher.sort_chunks_by_idxs(y, sizes, torch.tensor([2, 0, 1]))
    return same is y, torch.equal(other, torch.cat([y[50:], y[:20], y[20:50]]))


def test_tokens_go_and_come_as_the_engines() -> None:
    assert run_ranks(1, moves) == [(True, True)]


@pytest.mark.parametrize("given", [{"fused": True}, {"drop_and_pad": True}, {"num_out_tokens": torch.tensor(9)}])
def test_other_ways_of_routing_stay_the_engines(given: dict[str, Any]) -> None:
    from megatron_mixtral.runtime.gpu import permutation

    class OnGpu(torch.Tensor):
        is_cuda = True

    asked = []
    permutation._permute(lambda *args, **kwargs: asked.append(args), torch.ones(4, 2).as_subclass(OnGpu),
                         torch.ones(4, 2), **{"num_out_tokens": 8, **given})
    assert len(asked) == 1
