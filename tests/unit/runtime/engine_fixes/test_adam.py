"""The optimizer's arithmetic is torch's, its state the engine's."""

import copy

import pytest
import torch

from megatron_mixtral.runtime.engine_fixes import adam


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_is_torchs(decoupled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((5, 3), (7,))]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    mine = adam.FusedAdam(ours, adam_w_mode=decoupled, **settings)
    torchs = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, fused=True, **settings)
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mine.step()
        torchs.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert set(mine.state[a]) == {"exp_avg", "exp_avg_sq"}
    assert mine.param_groups[0]["step"] == 20


def test_adam_state_survives_a_round_trip() -> None:
    parameter = torch.ones(3, requires_grad=True)
    first = adam.FusedAdam([parameter], lr=0.1)
    parameter.grad = torch.ones(3)
    first.step()
    loaded = parameter.detach().clone().requires_grad_()
    second = adam.FusedAdam([loaded], lr=0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # as through a file
    for optimizer, p in ((first, parameter), (second, loaded)):
        p.grad = torch.full((3,), 0.5)
        optimizer.step()
    assert torch.equal(parameter, loaded) and second.param_groups[0]["step"] == 2


def test_adam_skips_parameters_without_gradient() -> None:
    used, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = adam.FusedAdam([used, unused], lr=0.1)
    used.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(unused.detach(), torch.ones(2)) and not torch.equal(used.detach(), torch.ones(2))
