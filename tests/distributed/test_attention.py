"""The attention equals the engine's unfused one, whole and packed, with its gradients; packed models equal unpacked."""

from pathlib import Path

import pytest
import torch
from helpers import engine
from helpers.models import tiny_hf_mixtral
from helpers.ranks import RankError, run_ranks

from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.weights import convert, open_sink, open_source

LENGTHS = [7, 1, 13, 3]


def _attentions(window: tuple[int, int] | None) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and the engine's, of 4 query heads in 2 groups, head size 8."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_mixtral.model.attention import CausalAttention

    engine.set_up({})
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=8,
                               attention_dropout=0.0, masked_softmax_fusion=False, window_size=window)
    return tuple(module(config, 1, AttnMaskType.causal, "self") for module in (CausalAttention, DotProductAttention))


def _inputs(*leading: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*leading, heads, 8, generator=generator).requires_grad_() for heads in (4, 2, 2)]


def _causal(length: int, window: tuple[int, int] | None) -> torch.Tensor:
    """The engine's mask [1, 1, s, s]: True where a key is hidden."""
    place = torch.arange(length)
    distance = place[:, None] - place[None, :]
    return ((distance < 0) | (distance > (window[0] if window else length)))[None, None]


def _with_gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    return [output.detach(), *torch.autograd.grad(output, inputs, weights)]


def _difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest, relative to the tensor's largest value where that is above 1."""
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(ours, theirs, strict=True))


def _whole(rank: int, window: tuple[int, int] | None) -> float:
    ours, theirs = _attentions(window)
    inputs = _inputs(24, 3)
    expected = theirs(*inputs, _causal(24, window))
    return _difference(_with_gradients(ours(*inputs), inputs), _with_gradients(expected, inputs))


def _packed(rank: int, window: tuple[int, int] | None) -> float:
    from megatron.core.packed_seq_params import PackedSeqParams

    ours, theirs = _attentions(window)
    inputs = _inputs(sum(LENGTHS))
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    parts = zip(*(x[:, None].split(LENGTHS) for x in inputs), strict=True)
    expected = torch.cat([theirs(*part, _causal(part[0].shape[0], window))[:, 0] for part in parts])
    return _difference(_with_gradients(ours(*inputs, packed_seq_params=packed), inputs),
                       _with_gradients(expected, inputs))


@pytest.mark.parametrize("window", [None, (4, 0)])
@pytest.mark.parametrize("body", [_whole, _packed])
def test_equals_the_engines_unfused_attention(body, window):
    [difference] = run_ranks(1, body, window)
    assert difference < 1e-6


def _too_short(rank: int) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    ours, _ = _attentions(None)
    bounds = torch.tensor([0, 4, 6], dtype=torch.int32)
    ours(*_inputs(8), packed_seq_params=PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds))


def test_sequences_that_do_not_fill_the_row_are_refused():
    with pytest.raises(RankError, match=r"lengths \[4, 2\] do not fill a row of 8 tokens"):
        run_ranks(1, _too_short)


# -- the model as a whole --------------------------------------------------------------------------------


def _losses(rank: int, checkpoint: str, layout: dict[str, int], rows: list[list[int]], packed: bool,
            recompute: dict[str, object]) -> tuple[list[torch.Tensor], float]:
    """Token losses of each row of ids, and the norm of this rank's gradients, run row by row or in one pack.

    Under sequence parallelism norms and routers have only this rank's part of a gradient, which the cut decides.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    [model] = engine.load_stages(checkpoint, layout, **recompute)
    lengths = [len(row) - 1 for row in rows]
    groups = [rows] if packed else [[row] for row in rows]
    found, total = [], 0.0
    for group in groups:
        sizes = [len(row) - 1 for row in group]
        tokens, labels = (torch.tensor([id for row in group for id in row[cut]])[None]
                          for cut in (slice(None, -1), slice(1, None)))
        positions = torch.cat([torch.arange(size) for size in sizes])[None]
        bounds = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
        params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds,
                                 max_seqlen_q=max(sizes), max_seqlen_kv=max(sizes)) if packed else None
        losses = model(tokens, positions, None, labels=labels, packed_seq_params=params)
        found.append(losses.detach()[0])
        total = total + losses.sum()
    total.backward()
    whole = [p.grad for p in model.parameters() if not getattr(p, "sequence_parallel", False)]
    norm = sum(float(grad.double().square().sum()) for grad in whole) ** 0.5
    return list(torch.cat(found).split(lengths)), norm


@pytest.mark.parametrize(("layout", "world", "recompute"), [
    ({}, 1, {}),
    ({"tp": 2}, 2, {}),
    ({"tp": 2}, 2, {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}),
    ({}, 1, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
], ids=["one", "tp2", "tp2-selective", "full-recompute"])
def test_a_packed_row_equals_its_sequences(layout, world, recompute, tmp_path: Path):
    convert(open_source(tiny_hf_mixtral(tmp_path / "hf")),
            open_sink(tmp_path / "ranks", "torch", ParallelLayout(**layout)))
    ids = torch.randint(3, 96, (39,), generator=torch.Generator().manual_seed(9)).tolist()
    rows = [ids[:13], ids[13:20], ids[20:39]]  # even numbers of tokens, for sequence parallelism
    arguments = (str(tmp_path / "ranks"), layout, rows)
    packed = run_ranks(world, _losses, *arguments, True, recompute)
    apart = run_ranks(world, _losses, *arguments, False, recompute)
    for (ours, norm), (theirs, other) in zip(packed, apart, strict=True):
        assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) < 1e-5
        assert norm == pytest.approx(other, rel=1e-5)
