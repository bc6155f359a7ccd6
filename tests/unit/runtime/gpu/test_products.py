"""Products into the gradient buffer, and the choice between two ways, with torch's answers on a GPU made on the CPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_mixtral.runtime.gpu import products

ADDMM = torch.addmm


def as_on_cuda(into: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, alpha: float, out_dtype: torch.dtype,
               out: torch.Tensor) -> torch.Tensor:
    """torch.addmm with `out_dtype`, which torch has on CUDA alone: 16-bit operands, sums in fp32, no rounding."""
    assert out_dtype == torch.float32 and out is into and a.dtype == b.dtype == torch.bfloat16
    return out.copy_(ADDMM(into, a.float(), b.float(), alpha=alpha))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every answer that is asked for once is asked for again."""
    for name in ("ones", "full"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, _of=make, **given: _of(*args, **(given | {"device": "cpu"})))
    monkeypatch.setattr(torch, "addmm", as_on_cuda)
    monkeypatch.setattr(products, "_chosen", {})
    products.adds_into_fp32.cache_clear()
    yield SimpleNamespace(set=monkeypatch.setattr)
    products.adds_into_fp32.cache_clear()


def operands(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(256, side, generator=generator).bfloat16() for side in (64, 96))


def test_bf16_gradients_in_an_fp32_buffer_are_nearer_to_fp64(gpu: Any) -> None:
    """Of eight micro-batches: the product that is rounded before it is added, as the engine adds it, is 1.7e-3 off."""
    exact = torch.zeros(64, 96, dtype=torch.float64)
    into, rounded = torch.zeros(64, 96), torch.zeros(64, 96)
    for seed in range(8):
        grad, x = operands(seed)
        exact += grad.double().t() @ x.double()
        assert products.add_product(into, grad, x).data_ptr() == into.data_ptr()
        rounded.add_(grad.t() @ x)
    off, off_rounded = ((one.double() - exact).norm() / exact.norm() for one in (into, rounded))
    assert off < 1e-6 and 1e-3 < off_rounded < 3e-3, (off, off_rounded)


@pytest.mark.parametrize("refusal", [RuntimeError("out_dtype is only supported"), TypeError("unexpected keyword")])
def test_where_torch_refuses_the_product_is_added_as_before(refusal: Exception, gpu: Any) -> None:
    def refuse(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise refusal

    gpu.set(torch, "addmm", refuse)
    (grad, x), into = operands(0), torch.ones(64, 96)
    assert torch.equal(products.add_product(into, grad, x, 0.5), torch.ones(64, 96).add_(grad.t() @ x, alpha=0.5))


@pytest.mark.parametrize("answer", [lambda into, a, b, alpha: (a.float() @ b.float()) * alpha,  # forgets what was there
                                    lambda into, a, b, alpha: into + (a @ b).float()])  # forgets the factor
def test_a_wrong_answer_is_a_refusal(answer: Any, gpu: Any) -> None:
    gpu.set(torch, "addmm", lambda into, a, b, alpha, out_dtype, out: out.copy_(answer(into, a, b, alpha)))
    assert not products.adds_into_fp32()


def test_one_type_and_a_factor(gpu: Any) -> None:
    gpu.set(torch, "addmm", ADDMM)
    grad, x = (one.float() for one in operands(0))
    torch.testing.assert_close(products.add_product(torch.ones(64, 96), grad, x, 3.0), 1 + 3 * (grad.t() @ x))


def test_the_faster_way_is_taken_and_asked_for_once(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> None:
    clock, calls = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    def way(name: str, milliseconds: float) -> Any:
        def run() -> str:
            calls.append(name)
            clock[0] += milliseconds
            return name

        return run

    monkeypatch.setattr(torch.cuda, "Event", Event)
    slow, fast = way("slow", 2.0), way("fast", 1.0)
    assert products.fastest("a shape", slow, fast) == "fast"
    calls.clear()
    assert products.fastest("a shape", slow, fast) == "fast" and calls == ["fast"]
    assert products.fastest("another", fast, slow) == "fast"


@pytest.mark.parametrize(("capability", "dtype", "fast"), [
    ((9, 0), torch.bfloat16, True), ((10, 3), torch.bfloat16, True), ((8, 0), torch.bfloat16, False),
    ((12, 0), torch.bfloat16, False), ((9, 0), torch.float16, False), ((9, 0), torch.float32, False)])
def test_groups_are_fast_for_bf16_on_hopper_and_blackwell(capability: tuple[int, int], dtype: torch.dtype, fast: bool,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert products.groups_are_fast(dtype) is fast


def test_ends_of_groups() -> None:
    ends = products.group_ends((3, 0, 4), torch.device("cpu"))
    assert ends.dtype == torch.int32 and ends.tolist() == [3, 3, 7]
