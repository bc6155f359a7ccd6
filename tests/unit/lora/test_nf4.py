"""NF4 in plain torch and in numpy: byte-equal to bitsandbytes, in every type and shape."""

import numpy
import pytest
import torch

from megatron_mixtral.errors import ConfigError
from megatron_mixtral.lora.nf4 import STEPS, Packed, Slot, pack, unpack
from megatron_mixtral.weights.adapters import nf4 as table


def weights(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(512, 256), (4, 96, 128)])
def test_bytes_equal_bitsandbytes(dtype: torch.dtype, shape: tuple) -> None:
    from bitsandbytes import functional

    dense = weights(*shape, dtype=dtype)
    dense.view(-1, 64)[3] = 0  # a block of zeros
    theirs, state = functional.quantize_4bit(dense, blocksize=64, compress_statistics=False, quant_type="nf4")
    packed, absmax = pack(dense)
    assert packed.shape == (*shape[:-1], shape[-1] // 2) and absmax.dtype == dtype
    assert torch.equal(packed.flatten(), theirs.flatten())
    assert torch.equal(absmax.flatten().float(), state.absmax), "the largest magnitudes are exact in the weights' type"
    assert torch.equal(unpack(packed, absmax, dtype), functional.dequantize_4bit(theirs, state))


def test_numbers_on_the_bounds_go_where_bitsandbytes_puts_them() -> None:
    from bitsandbytes import functional

    edges = torch.from_numpy(numpy.concatenate([table.BOUNDS, numpy.nextafter(table.BOUNDS, numpy.float32(2)),
                                                numpy.nextafter(table.BOUNDS, numpy.float32(-2)), table.VALUES]))
    block = torch.cat([edges, torch.ones(64 - len(edges) % 64)]).view(-1, 64)
    block[:, 0] = 1.0
    theirs, _ = functional.quantize_4bit(block, blocksize=64, compress_statistics=False, quant_type="nf4")
    assert torch.equal(pack(block)[0].flatten(), theirs.flatten())


def test_numpy_rounds_as_torch_packs() -> None:
    dense = weights(96, 256)
    assert numpy.array_equal(table.rounded(dense.numpy()), unpack(*pack(dense), torch.float32).numpy())


def test_shards_of_rows_and_of_whole_blocks_are_those_of_the_whole() -> None:
    dense = weights(64, 256, dtype=torch.bfloat16)
    packed, absmax = pack(dense)
    for part, own, largest in ((dense[:32], packed[:32], absmax[:32]), (dense[:, 128:], packed[:, 64:], absmax[:, 2:])):
        found = pack(part.contiguous())
        assert torch.equal(found[0], own) and torch.equal(found[1], largest)


def test_more_than_a_step_and_packing_twice() -> None:
    dense = weights(2, STEPS["cpu"] // 128 + 3, 128, dtype=torch.bfloat16)
    once = unpack(*pack(dense), torch.bfloat16)
    assert torch.equal(once, torch.stack([unpack(*pack(one), torch.bfloat16) for one in dense]))
    assert (once - dense).abs().max() < 0.02 and torch.equal(unpack(*pack(once), torch.bfloat16), once)


def test_a_packed_stack_is_filled_expert_by_expert() -> None:
    dense = weights(3, 32, 64, dtype=torch.bfloat16)
    stack = Packed((3, 32, 64), torch.bfloat16, "cpu")
    for index in range(3):
        Slot(stack, index).copy_(dense[index])
    assert torch.equal(stack.dense(torch.bfloat16), unpack(*pack(dense), torch.bfloat16))
    size = sum(one.numel() * one.element_size() for one in stack.buffers())
    assert size == 0.53125 * dense.numel() and not list(stack.parameters())
    assert stack.bfloat16().absmax.dtype == torch.bfloat16 and stack.nf4.dtype == torch.uint8


def test_a_share_of_a_row_that_is_no_whole_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="blocks of 64 .* has 48: choose tensor parallel sizes"):
        Packed((32, 48), torch.bfloat16, "cpu")
