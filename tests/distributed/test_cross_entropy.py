"""The chunked loss is the engine's, with every gradient, and no tensor holds the logits of all tokens."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from helpers import engine
from helpers.models import tiny_hf_mixtral
from helpers.ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.weights import convert, open_sink, open_source

BATCH, SEQUENCE, VOCABULARY, HIDDEN, CHUNK_TOKENS = 2, 26, 96, 32, 10


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor over the vocabulary of a rank, but the weight itself."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.elements = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (self.vocabulary,) and result.shape[0] != HIDDEN:
            self.elements = max(self.elements, result.numel())
        return result


def _compare(rank: int, checkpoint: str, layout: dict[str, int], dtype: torch.dtype, wrapped: bool,
             masked: bool) -> dict:
    """With `masked` the gradient is the one that the loss mask announces, else one that nothing announces."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel

    from megatron_mixtral.model import cross_entropy

    [model] = engine.load_stages(checkpoint, layout, dtype)
    generator = torch.Generator().manual_seed(4)
    tokens, labels = torch.randint(3, VOCABULARY, (2, BATCH, SEQUENCE), generator=generator)
    positions, scales = torch.arange(SEQUENCE)[None], torch.rand(BATCH, SEQUENCE, generator=generator)
    scales[0, :5] = 0.0
    if masked:
        scales = 0.3 * scales.gt(0.5).float()
    told = {"loss_mask": scales / 0.3} if masked else {}
    alive: list[torch.nn.Module] = []
    if wrapped:
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        alive.append(DistributedDataParallel(model.config, ddp, model))  # its hooks live as long as it does
    local = VOCABULARY // layout.get("tp", 1)
    results, watch = [], Largest(local)
    with patch.object(cross_entropy, "CPU_CHUNK", CHUNK_TOKENS * local), \
            patch.object(cross_entropy, "GPU_CHUNK", CHUNK_TOKENS * local):
        for forward in (model.forward, lambda *args, **kwargs: GPTModel.forward(model, *args, **kwargs)):
            for parameter in model.parameters():
                if wrapped:
                    parameter.main_grad.zero_()
                    parameter.grad_added_to_main_grad = False
                parameter.grad = None
            with watch if not results else torch.enable_grad():
                losses = forward(tokens, positions, None, labels=labels, **told)
                (losses.float() * scales).sum().backward()
            results.append([losses.detach().float(), *((p.main_grad if wrapped else p.grad).float().clone()
                                                       for p in model.parameters())])
    worst = max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(*results, strict=True))
    return {"worst": worst, "largest": watch.elements, "chunk": CHUNK_TOKENS * local,
            "head": float(results[0][-1].abs().max())}


@pytest.mark.parametrize(("layout", "world", "dtype", "wrapped", "tied", "masked"), [
    ({}, 1, torch.float32, False, False, False),
    ({}, 1, torch.float32, True, False, True),
    ({"tp": 2}, 2, torch.float32, True, False, False),
    ({"tp": 2}, 2, torch.float32, True, False, True),
    ({}, 1, torch.float32, True, True, True),
    ({}, 1, torch.bfloat16, True, False, True),
], ids=["plain", "ddp", "tp2", "tp2-masked", "tied", "bf16"])
def test_equals_the_engines_loss_in_chunks(layout, world, dtype, wrapped, tied, masked, tmp_path: Path):
    convert(open_source(tiny_hf_mixtral(tmp_path / "hf", tie_word_embeddings=tied, intermediate_size=40)),
            open_sink(tmp_path / "ranks", "torch", ParallelLayout(**layout)))
    for found in run_ranks(world, _compare, str(tmp_path / "ranks"), layout, dtype, wrapped, masked):
        assert found["worst"] < (1e-6 if dtype == torch.float32 else 2e-2), found
        assert found["head"] > 0.01 and found["largest"] == found["chunk"], found
