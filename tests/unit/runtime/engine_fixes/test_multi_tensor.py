"""Clipping in place equals the engine's; collectives of one rank with itself change nothing."""

import pytest
import torch
from helpers.ranks import run_ranks

from megatron_mixtral.runtime.engine_fixes import multi_tensor


def test_clipping_in_place_is_the_engines() -> None:
    from megatron.core.utils import local_multi_tensor_scale

    flag = torch.zeros(1)
    gradients = [torch.randn(shape, generator=torch.Generator().manual_seed(2)) for shape in ((5, 3), (7,), (0,))]
    expected = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    found, _ = multi_tensor.l2_norm(1, flag, [gradients], False)
    assert found.shape == (1,) and found.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs, apart = ([torch.full_like(gradient, 9.0) for gradient in gradients] for _ in range(2))
    local_multi_tensor_scale(1, flag, [gradients, theirs], 0.25)
    multi_tensor.scale(1, flag, [gradients, apart], 0.25)
    addresses = [gradient.data_ptr() for gradient in gradients]
    multi_tensor.scale(1, flag, [gradients, gradients], 0.25)
    assert [gradient.data_ptr() for gradient in gradients] == addresses
    for a, b, c in zip(theirs, apart, gradients, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("sizes", [(1_000_000,), (33_000_000,), (7, 0, 70_000, 65_536)])
def test_the_norm_of_many_elements_is_that_of_fp64(sizes: tuple[int, ...]) -> None:
    """torch's own norms of fp32 on a CPU are 2e-3 too small for the largest."""
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(size, generator=generator) for size in sizes]
    expected = sum(gradient.double().square().sum() for gradient in gradients).sqrt().item()
    found, _ = multi_tensor.l2_norm(1, torch.zeros(1), [gradients], False)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected, rel=3e-7)
    halves = [gradient.bfloat16() for gradient in gradients]
    expected = sum(gradient.double().square().sum() for gradient in halves).sqrt().item()
    assert multi_tensor.l2_norm(1, torch.zeros(1), [halves], False)[0].item() == pytest.approx(expected, rel=3e-7)


def test_nothing_to_add_is_zero() -> None:
    for none in ([], [torch.zeros(0)]):
        assert multi_tensor.l2_norm(1, torch.zeros(1), [none], False)[0].tolist() == [0.0]


def _alone(rank: int) -> None:
    from megatron.core.distributed import param_and_grad_buffer as buffers

    whole = torch.arange(4.0)
    for collective in (buffers.dist_all_gather_func, buffers.dist_reduce_scatter_func):
        out = torch.zeros(4)
        collective(out, whole, group=torch.distributed.group.WORLD)
        collective(whole, whole[:], group=torch.distributed.group.WORLD)
        assert torch.equal(out, torch.arange(4.0)) and torch.equal(whole, out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo stands in only where no GPU is visible")
def test_buffers_of_a_group_of_one_stay_as_they_are() -> None:
    run_ranks(1, _alone)
