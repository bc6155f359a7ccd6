"""A sequence cut over ranks is trained as on one: loss, norm, every gradient, in any layout, from any kind of data.

What one rank computes of whole sequences is compared elsewhere with `transformers` (test_equivalence.py, which has
layouts with context parallelism too). Here a layout with it is compared with the same one without, rank by rank, on as
many ranks: each holds the same shards, whose gradients have to be the same.
"""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import engine
from helpers.models import tiny_hf_mixtral
from helpers.ranks import RankError, run_ranks

from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.weights import convert, open_sink, open_source

ROWS, SEQUENCE, WINDOW = 4, 48, 9
LENGTHS = [[13, 1, 8], [30], [3, 5, 2, 9], [7, 7, 7]]  # positions of the samples in each packed row: odd ones too
CORE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
AUX = {"moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1}
GLOBALLY = {"balanced-globally": {"moe_router_load_balancing_type": "global_aux_loss", **AUX}}
LAYOUTS = {  # sizes without context parallelism, its size, ranks
    "cp2": ({}, 2, 2), "cp4": ({}, 4, 4), "tp2-cp2": ({"tp": 2}, 2, 4), "pp2-cp2": ({"pp": 2}, 2, 4),
    "ep2-cp2": ({"ep": 2}, 2, 2), "pp2-vpp2-cp2": ({"pp": 2, "vpp": 2}, 2, 4),
    "tp2-cp2-ep2-etp1": ({"tp": 2, "ep": 2, "etp": 1}, 2, 4), "cp2-dp2": ({}, 2, 4),
}
# What is trained (`window`: of the model with one), and the fields of the engine's configuration.
CASES: dict[str, dict[str, Any]] = {
    "per-token": {"calculate_per_token_loss": True},
    "per-row": {},
    "window": {"window": True},
    "packed": {"packed": True, "calculate_per_token_loss": True, **AUX},
}
MORE: dict[str, dict[str, Any]] = {
    **CASES,
    "balanced": AUX, "balanced-per-token": {"calculate_per_token_loss": True, **AUX},
    "balanced-by-sequence": {"moe_router_load_balancing_type": "seq_aux_loss", **AUX},
    "attention-again": {**CORE, **AUX}, "layers-again": {**FULL, **AUX},
    "packed-window": {"window": True, "packed": True}, "packed-again": {"packed": True, **FULL, **AUX},
    "packed-per-row": {"packed": True, **AUX},
}
POOLED = {"pooled": {"pool_aux_loss": True, **AUX}, "pooled-again": {"pool_aux_loss": True, **AUX, **FULL}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("context")
    tiny_hf_mixtral(root / "hf-plain")
    tiny_hf_mixtral(root / "hf-window", sliding_window=WINDOW)
    return root


def checkpoints(folder: Path, sizes: dict[str, int]) -> dict[bool, str]:
    """Rank directories of a layout, without (False) and with (True) a sliding window."""
    layout, found = ParallelLayout(**sizes), {}
    for kind in ("plain", "window"):
        place = folder / f"{kind}-{layout}"
        if not place.exists():
            convert(open_source(folder / f"hf-{kind}"), open_sink(place, "torch", layout))
        found[kind == "window"] = str(place)
    return found


def text_rows() -> list[dict[str, torch.Tensor]]:
    """Whole rows. Trained are other numbers of tokens in each chunk; in the first row, none of the first half."""
    ids = torch.randint(3, 96, (ROWS, SEQUENCE + 1), generator=torch.Generator().manual_seed(7))
    positions = torch.arange(SEQUENCE)
    masks = [positions >= SEQUENCE // 2, positions % 5 != 0, positions < 20, positions % 7 == 3]
    return [{"tokens": row[None, :-1], "labels": row[None, 1:], "position_ids": positions[None],
             "loss_mask": mask.float()[None]} for row, mask in zip(ids, masks, strict=True)]


def packed_rows(multiple: int) -> list[dict[str, torch.Tensor]]:
    """Instruction data: half of each sample is trained."""
    from megatron_mixtral.data.datasets import row_tensors

    rng, rows = np.random.default_rng(0), []
    for lengths in LENGTHS:
        samples = []
        for length in lengths:
            ids = rng.integers(3, 96, length + 1).astype(np.int32)
            samples.append((ids, np.where(np.arange(length + 1) < length // 2, np.int32(-100), ids)))
        rows.append({name: tensor[None] for name, tensor in row_tensors(samples, SEQUENCE, multiple).items()})
    return rows


def _text_step(iterator: Any, model: Any) -> Any:
    """As `micro_batch.text_step`, without the engine's global arguments."""
    from megatron_mixtral.training import micro_batch

    return micro_batch._forward(model, micro_batch.own_chunks(dict(next(iterator))))


def steps(rank: int, paths: dict[bool, str], layout: dict[str, int], cases: dict[str, dict[str, Any]]) -> Any:
    """By case: loss (of the last stage), norm of this rank's gradients, and the gradients by name."""
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.timers import Timers
    from megatron.training import global_vars

    from megatron_mixtral.training import micro_batch

    global_vars._GLOBAL_TIMERS = Timers(0, "minmax")
    found = {}
    for name, case in cases.items():
        options = {key: value for key, value in case.items() if key not in ("window", "packed")}
        chunks = engine.load_stages(paths[case.get("window", False)], layout, **options)
        config = chunks[0].config
        chunks = [DistributedDataParallel(config, DistributedDataParallelConfig(), chunk, disable_bucketing=index > 0)
                  for index, chunk in enumerate(chunks)]
        config.finalize_model_grads_func = finalize_model_grads
        rows = packed_rows(ParallelLayout(**layout).chunks) if case.get("packed") else text_rows()
        share = np.array_split(np.arange(ROWS), mpu.get_data_parallel_world_size())[mpu.get_data_parallel_rank()]
        reduced = engine._schedule(chunks, [rows[index] for index in share], partial(_step, case, micro_batch),
                                  seq_length=SEQUENCE, forward_only=False)
        loss = None
        if mpu.is_pipeline_last_stage(ignore_virtual=True):
            total = torch.stack([one["lm loss"] for one in reduced]).sum(0)
            torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
            loss = float(total[0] / total[1])
        gradients = {f"{index}.{key}": parameter.main_grad.clone() for index, chunk in enumerate(chunks)
                     for key, parameter in chunk.module.named_parameters()}
        found[name] = SimpleNamespace(loss=loss, gradients=gradients)
    return found


def _step(case: dict[str, Any], micro_batch: Any, iterator: Any, model: Any) -> Any:
    return micro_batch.instruction_step(iterator, model) if case.get("packed") else _text_step(iterator, model)


def check(folder: Path, name: str, cases: dict[str, dict[str, Any]], replicas: bool = True) -> None:
    """`replicas`: without context parallelism its ranks are replicas, which read other rows; else they are left out."""
    sizes, parts, world = LAYOUTS[name]
    paths = checkpoints(folder, sizes)
    found = run_ranks(world, steps, paths, {**sizes, "cp": parts}, cases)
    wanted = run_ranks(world if replicas else world // parts, steps, paths, sizes, cases)
    wanted *= 1 if replicas else parts
    for case in cases:
        losses, gaps = [], {}
        for ours, theirs in zip(found, wanted, strict=True):
            one, other = ours[case], theirs[case]
            losses += [] if other.loss is None else [abs(one.loss - other.loss)]
            assert max(float(gradient.abs().max()) for gradient in other.gradients.values()) > 1e-2
            for key, gradient in other.gradients.items():
                gaps[key] = max(gaps.get(key, 0.0), float((one.gradients[key] - gradient).abs().max()))
        worst = max(gaps, key=gaps.__getitem__)
        print(f"{name} {case}: loss {max(losses):.1e}, gradients {gaps[worst]:.1e} ({worst})")
        assert max(losses) < 2e-6 and gaps[worst] < 1e-6, case


def test_a_sequence_on_two_ranks_is_that_of_one(folder: Path) -> None:
    check(folder, "cp2", CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_and_every_kind_of_step(name: str, folder: Path) -> None:
    check(folder, name, {**MORE, **(POOLED if "pp2" not in name else {})})


@pytest.mark.slow
def test_a_loss_over_the_global_batch(folder: Path) -> None:
    """The engine's adds up the micro-batches in their order."""
    check(folder, "cp4", GLOBALLY, replicas=False)


def _by_its_definition(q_tnd: torch.Tensor, k_tgd: torch.Tensor, v_tgd: torch.Tensor, q_bounds: torch.Tensor,
                       k_bounds: torch.Tensor, longest_q: int, longest_k: int, *, scale: float,
                       window_size: tuple[int, int], enable_gqa: bool) -> torch.Tensor:
    """torch's `varlen_attn`, which only a GPU has: the last query of each sequence is aligned with its last key."""
    assert max(q_bounds.diff()) == longest_q and max(k_bounds.diff()) == longest_k and window_size[1] == 0
    assert int(q_bounds[-1]) == len(q_tnd) and int(k_bounds[-1]) == len(k_tgd) and q_bounds.dtype == torch.int32
    found = []
    for queries, keys in zip(q_bounds.unfold(0, 2, 1).tolist(), k_bounds.unfold(0, 2, 1).tolist(), strict=True):
        q, k, v = q_tnd[slice(*queries)], k_tgd[slice(*keys)], v_tgd[slice(*keys)]
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        seen = (distance >= 0) & (distance <= (window_size[0] if window_size[0] >= 0 else len(k)))
        found.append(torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=seen, scale=scale, enable_gqa=enable_gqa)[0])
    return torch.cat(found, dim=1).transpose(0, 1)


def _through_the_kernel(rank: int, paths: dict[bool, str]) -> list[float]:
    """Largest differences between the path of a GPU and that of a CPU: rows and packed rows, output and gradients."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from torch.nn.attention import varlen

    from megatron_mixtral.model import attention

    found = []
    for window in (False, True):
        [model] = engine.load_stages(paths[window], {"cp": 2})
        core = model.decoder.layers[0].self_attention.core_attention
        bounds = torch.tensor([0, 8, 32, 36], dtype=torch.int32)
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
        for leading, params in (((18,), packed), ((18, 3), None)):
            generator = torch.Generator().manual_seed(rank)
            inputs = [torch.randn(*leading, heads, 8, generator=generator).requires_grad_() for heads in (4, 2, 2)]
            results = []
            for has_flash in (False, True):
                attention.gpu.has_flash, varlen.varlen_attn = (lambda query, it=has_flash: it), _by_its_definition
                out = core(*inputs, packed_seq_params=params)
                weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
                results.append([out.detach(), *torch.autograd.grad(out, inputs, weights)])
            found += [float((one - other).abs().max()) for one, other in zip(*results, strict=True)]
    return found


@pytest.mark.slow
def test_the_bounds_that_a_gpu_gets(folder: Path) -> None:
    for found in run_ranks(2, _through_the_kernel, checkpoints(folder, {})):
        assert len(found) == 16 and max(found) < 2e-6


def _unequal(rank: int, path: str) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    [model] = engine.load_stages(path, {"cp": 2})
    bounds = torch.tensor([0, 6, 16], dtype=torch.int32)
    heads = [torch.ones(8, number, 8) for number in (4, 2, 2)]  # rotary embeddings would fail before
    model.decoder.layers[0].self_attention.core_attention(*heads, packed_seq_params=PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=10, max_seqlen_kv=10))


@pytest.mark.slow
def test_a_sequence_without_equal_chunks_is_refused(folder: Path) -> None:
    with pytest.raises(RankError, match=r"sequences of \[6, 10\] tokens cannot be cut into 2 x 2 equal chunks"):
        run_ranks(2, _unequal, checkpoints(folder, {})[False])
