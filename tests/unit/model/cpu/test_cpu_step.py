"""What a training step on a CPU is made of, against torch's own: the norm, SwiGLU, chunks, and the heap."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_mixtral.model import cross_entropy
from megatron_mixtral.model.cpu.few_rows import linear_of_few
from megatron_mixtral.model.cpu.swiglu import WeightedSwiGLU
from megatron_mixtral.model.experts import _rounded_up
from megatron_mixtral.model.norm import RMSNorm

CASES = [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)]


def _compare(ours, theirs, inputs, tolerance) -> None:
    """Output and the gradient of every input, `theirs` in float64."""
    wide = [one.detach().double().requires_grad_() for one in inputs]
    found, expected = ours(*inputs), theirs(*wide)
    assert found.dtype == inputs[0].dtype
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype)
    pairs = [(found, expected), *zip(torch.autograd.grad(found, inputs, weight),
                                     torch.autograd.grad(expected, wide, weight.double()), strict=True)]
    for a, b in pairs:
        assert float(((a.double() - b).abs().max() / b.abs().max()).detach()) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), CASES)
def test_norm_and_its_gradients_are_torchs(dtype, tolerance):
    generator = torch.Generator().manual_seed(3)
    norm = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=False), 48, eps=1e-5)
    x = (torch.randn(7, 2, 48, generator=generator) * 3).to(dtype)
    x[2] = 0.0  # eps alone keeps this one finite
    weight = torch.rand(48, generator=generator).to(dtype)

    def ours(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    def theirs(x, weight):
        return torch.nn.functional.rms_norm(x, (48,), weight, 1e-5)

    _compare(ours, theirs, [x.requires_grad_(), weight.requires_grad_()], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), CASES)
def test_swiglu_and_its_gradients_are_the_formulas(dtype, tolerance):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, 32, generator=generator).to(dtype).requires_grad_()
    probability = torch.rand(9, 1, generator=generator).requires_grad_()  # fp32, as the router gives it

    def theirs(x, probability):
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up * probability

    _compare(WeightedSwiGLU.apply, theirs, [x, probability], tolerance)


def test_counts_of_tokens_are_filled_up():
    rows, filled = _rounded_up([1, 17, 0, 4])
    assert filled == [16, 32, 0, 16] and rows.tolist() == [0, *range(16, 33), *range(48, 52)]
    rows, filled = _rounded_up([16, 0])
    assert filled == [16, 0] and rows.tolist() == list(range(16))


_FAULTS = """
import resource, ctypes
from megatron_mixtral.runtime.cpu import heap
kept = heap.keep_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def use(size=2**26):
    block = libc.malloc(size)
    libc.memset(block, 1, size)
    libc.free(block)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    use()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _page_faults(**environment: str) -> tuple[bool, int]:
    """(whether memory is kept, page faults of four uses of 64 MiB after a first)."""
    found = subprocess.run([sys.executable, "-c", _FAULTS], env={**os.environ, **environment}, check=True, text=True,
                           stdout=subprocess.PIPE).stdout.split()
    return found[0] == "1", int(found[1])


def test_freed_memory_serves_the_next_step():
    assert _page_faults(MALLOC_TRIM_THRESHOLD_="131072")[1] > 100  # the user's own wish stands
    kept, faults = _page_faults()
    assert kept and faults < 50


@pytest.mark.parametrize(("tokens", "vocabulary"), [(2, 32000), (511, 32000), (512, 32000), (4096, 32000), (7, 10**8)])
def test_no_chunk_of_fp32_logits_holds_all_tokens(tokens, vocabulary):
    chunks = cross_entropy._chunks(tokens, torch.empty(vocabulary, 1, device="meta"))
    assert [chunk.start for chunk in chunks[1:]] == [chunk.stop for chunk in chunks[:-1]]
    assert (chunks[0].start, chunks[-1].stop) == (0, tokens)
    assert max(chunk.stop - chunk.start for chunk in chunks) <= (tokens + 1) // 2 < tokens
    assert all((chunk.stop - chunk.start) * vocabulary <= max(cross_entropy.CPU_CHUNK, vocabulary) for chunk in chunks)


def test_a_linear_of_few_rows_is_that_of_the_whole_weight():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(3000, 200, generator=generator)  # 2.4 MB: 93 blocks of 32 rows, and 24 rows
    for rows in (0, 1, 3, 4, 8, 12, 13):
        x = torch.randn(rows, 200, generator=generator)
        found, expected = linear_of_few(x, weight), x.double() @ weight.double().t()
        assert found.shape == expected.shape and torch.allclose(found.double(), expected, rtol=0, atol=1e-4)
        assert linear_of_few(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
