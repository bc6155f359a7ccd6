"""The embedding that adds its gradient to the engine's buffer by rows equals the engine's, over two micro-batches."""

from pathlib import Path

import pytest
import torch
from helpers import engine
from helpers.models import tiny_hf_mixtral
from helpers.ranks import run_ranks

from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.weights import convert, open_sink, open_source

BATCH, SEQUENCE, VOCABULARY = 2, 26, 96


def _compare(rank: int, checkpoint: str, layout: dict[str, int], dtype: torch.dtype) -> dict:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    from megatron_mixtral.model.cpu.embedding import WordEmbedding

    [model] = engine.load_stages(checkpoint, layout, dtype)
    config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(model.config, config, model)
    generator = torch.Generator().manual_seed(4)
    # Few different tokens: most rows of the weight get nothing, some are asked for many times.
    batches = torch.randint(30, 66, (2, 2, BATCH, SEQUENCE), generator=generator)
    embedding, results = model.embedding.word_embeddings, []
    own = type(embedding) is WordEmbedding
    dense: list[torch.Tensor] = []
    embedding.weight.register_hook(lambda gradient: dense.append(gradient.detach()))
    for kind in (WordEmbedding, VocabParallelEmbedding):
        embedding.__class__ = kind
        wrapped.zero_grad_buffer()
        for tokens, labels in batches:
            losses = wrapped(tokens, torch.arange(SEQUENCE)[None], None, labels=labels)
            losses.float().mean().backward()
        results.append([losses.detach().float(), *(p.main_grad.clone() for p in model.parameters())])
    worst = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in zip(*results, strict=True))
    aliases = [gradient.data_ptr() == embedding.weight.data_ptr() for gradient in dense]
    return {"worst": worst, "own": own, "aliases": aliases, "size": float(embedding.weight.main_grad.abs().max())}


@pytest.mark.parametrize(("layout", "world", "dtype", "tied"), [
    ({}, 1, torch.float32, False),
    ({"tp": 2}, 2, torch.float32, False),
    ({}, 1, torch.float32, True),
    ({}, 1, torch.bfloat16, False),
], ids=["plain", "tp2", "tied", "bf16"])
def test_gradient_by_rows_is_the_engines(layout, world, dtype, tied, tmp_path: Path):
    convert(open_source(tiny_hf_mixtral(tmp_path / "hf", tie_word_embeddings=tied, intermediate_size=40)),
            open_sink(tmp_path / "ranks", "torch", ParallelLayout(**layout)))
    for found in run_ranks(world, _compare, str(tmp_path / "ranks"), layout, dtype):
        assert found["own"] and found["size"] > 1e-4, found
        assert found["worst"] < (1e-6 if dtype == torch.float32 else 2e-2), found
        # Two micro-batches of each kind. A weight shared with the output layer has its gradient from autograd.
        assert found["aliases"] == [not tied, not tied, False, False], found
